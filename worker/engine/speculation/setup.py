"""From the configuration of an engine to its speculator: which parts there are, and why not all."""

from pathlib import Path

import llama_cpp.llama_cpp as ll
import msgspec
import structlog

from worker.engine.calibrate import calibrated
from worker.engine.calibration import Calibration
from worker.engine.calibration_cache import DISTURBED_SECONDS
from worker.engine.decoder import Decoder
from worker.engine.gpu import offload
from worker.engine.llama import Context, LoadError, Model
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.drafter import Drafter
from worker.engine.speculation.kinship import same_model
from worker.engine.speculation.memory import Memory
from worker.engine.speculation.pairing import Unpaired, check_pair
from worker.engine.speculation.speculator import Speculator
from worker.gguf_header import GgufError
from worker.link import EngineConfig

__all__ = ("make_speculator",)

log = structlog.get_logger()


def make_speculator(
    config: EngineConfig,
    model: Model,
    context: Decoder,
    calibration: Calibration,
) -> tuple[Speculator | None, str]:
    """The speculator of a loaded model, and a line on a draft model that is not used, or nothing.

    Args:
        config: what the engine was told.
        model: the target.
        context: the target's, whose slots the draft follows.
        calibration: of the target.
    """
    if config.speculation == "off":
        return None, ""
    if ll.llama_model_is_recurrent(model.handle) or ll.llama_model_is_hybrid(model.handle):
        log.info("speculation.off", reason="the model's state cannot go back behind a token")
        return None, ""
    cost = StepCost(calibration.step_seconds, latency=lambda: context.latency)
    drafter, refusal = None, ""
    if config.draft and config.speculation == "auto":
        try:
            drafter = _drafter(config, model, context, calibration, cost)
        except (GgufError, LoadError, OSError, Unpaired) as error:
            refusal = f"{Path(config.draft).name} cannot draft for {config.model}: {error}"
            log.warning("draft.refused", draft=config.draft, reason=str(error))
    speculator = Speculator(
        cost,
        drafter=drafter,
        memory=Memory(config.ngram_memory) if config.ngram_memory else None,
        most_rows=config.step_tokens,
    )
    return speculator, refusal


def _drafter(
    config: EngineConfig,
    target: Model,
    context: Decoder,
    calibration: Calibration,
    target_cost: StepCost,
) -> Drafter:
    """Load the draft model and check that it fits.

    Raises:
        GgufError: it is no model that could be read.
        LoadError: llama.cpp cannot load it, or there is no memory.
        OSError: a file cannot be read any more.
        Unpaired: it is not of the target's vocabulary.
    """
    gpu = offload(msgspec.structs.replace(config, context=context.context), config.draft)
    model = Model(config.draft, gpu_layers=gpu.layers)
    try:
        check_pair(target, model)
        kin = _kin(config, context)
        own = Context(
            model,
            slots=context.slots,
            context=context.context,
            step_tokens=config.step_tokens,
            threads=calibration.threads,
            prefill_threads=calibration.prefill_threads,
        )
    except (GgufError, LoadError, OSError, Unpaired):
        model.close()
        raise
    # The draft computes with the target's threads, and is measured with them.
    measured = msgspec.structs.replace(
        config,
        path=config.draft,
        gpu_layers=gpu.layers,
        threads=calibration.threads,
        prefill_threads=calibration.prefill_threads,
    )
    # What the stages of a ring take is other machines' doing.
    beside = None if config.ring is not None else target_cost
    log.info("draft.loaded", draft=config.draft, reads_prompts=kin is None)
    report = calibrated(model, own, measured, disturbed_within=DISTURBED_SECONDS)
    cost = StepCost(report.calibration.step_seconds, beside=beside)
    return Drafter(
        own,
        cost,
        step_tokens=config.step_tokens,
        vocabulary=min(model.vocab_size, target.vocab_size),
        kin=kin,
    )


def _kin(config: EngineConfig, target: Decoder) -> Context | None:
    """The target's context, if the draft can go by its keys and values.

    Raises:
        GgufError: one of the files is no model that could be read.
        OSError: one of them cannot be read any more.
    """
    # Of a split model, each host has those of its own layers only.
    if isinstance(target, Context) and same_model(Path(config.path), Path(config.draft)):
        return target
    return None
