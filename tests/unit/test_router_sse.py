"""What waits for a slow reader is joined, and says the same."""

from hypothesis import given
from hypothesis import strategies as st

from router.sse import merge_frames
from shared.protocol import Delta, Done


@st.composite
def waiting(draw):
    """Frames of two parts with two choices each, in any order of the choices."""
    counts: dict[tuple[int, int], int] = {}
    frames = []
    for part, choice, size, text in draw(
        st.lists(
            st.tuples(
                st.integers(0, 1),
                st.integers(0, 1),
                st.integers(-1, 3),
                st.sampled_from(["", "a", "bc"]),
            ),
            max_size=20,
        )
    ):
        first = counts.get((part, choice), 0)
        if size < 0:
            frames.append((part, Done(1, choice, first, "stop")))
            continue
        frames.append((part, Delta(1, choice, first, tuple(range(first, first + size)), text)))
        counts[part, choice] = first + size
    return frames


def said(frames):
    """By part and choice: tokens and text, up to each end and each frame without tokens."""
    told: dict[tuple[int, int], list] = {}
    for part, frame in frames:
        mine = told.setdefault((part, frame.choice), [[], ""])
        if isinstance(frame, Done):
            mine.append(("done", list(mine[0]), mine[1]))
            continue
        assert frame.first == len(mine[0])
        mine[0] += frame.tokens
        mine[1] += frame.text
        if not frame.tokens:
            mine.append(("tail", list(mine[0]), mine[1]))
    return told


@given(waiting())
def test_merging_changes_nothing_but_the_number_of_frames(frames):
    merged = merge_frames(frames)

    assert said(merged) == said(frames)
    kinds = [(part, frame.choice, bool(getattr(frame, "tokens", ()))) for part, frame in merged]
    # Between two that must stay where they are, one of each choice is left.
    run: set[tuple[int, int]] = set()
    for part, choice, has_tokens in kinds:
        assert not has_tokens or (part, choice) not in run
        run = run | {(part, choice)} if has_tokens else set()
