"""`model: "auto"`: which model answers when the client leaves it to the mesh.

In this order: a model that is ready and in reach, then one that is being loaded, then one that
could be; one whose context holds the prompt; one with a free slot; the larger file, for larger
models answer better (of those that would have to be loaded first, the smaller: it is there sooner);
the most free slots; the name. Whether a model can call tools is not known and does not count.
"""

from router.fleet import Fleet, ModelView

__all__ = ("AUTO", "choose_model")

AUTO = "auto"
_RANKS = {"ready": 0, "loading": 1, "loadable": 2}


def choose_model(fleet: Fleet, *, embeddings: bool = False, tokens: int = 0) -> str:
    """Choose by what is served now; `auto` itself if a model bears that name, or none is there.

    Args:
        fleet: the workers.
        embeddings: whether it must be able to embed.
        tokens: length of the prompt, roughly.
    """
    if fleet.pool(AUTO) is not None or fleet.loadable(AUTO) is not None:
        return AUTO
    ranked: list[tuple[int, bool, bool, int, int, str]] = []
    for view in fleet.models():
        free = _free(fleet, view)
        if view.state not in _RANKS or free is None or (embeddings and not view.embeddings):
            continue
        ranked.append(
            (
                _RANKS[view.state],
                0 < view.context < tokens,
                view.state == "ready" and free <= 0,
                view.size if view.state == "loadable" else -view.size,
                -free,
                view.name,
            )
        )
    return min(ranked)[-1] if ranked else AUTO


def _free(fleet: Fleet, view: ModelView) -> int | None:
    """Free slots; None: it is served, but only by workers that are out of reach."""
    pool = fleet.pool(view.name)
    if pool is None:
        return 0
    return pool.free if pool.candidates else None
