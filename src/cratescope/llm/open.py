"""Open the language model that the options name, and say what identifies it."""

from __future__ import annotations

import functools

from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import LanguageModel


@functools.lru_cache(maxsize=1)
def open_llm(config: LLMConfig) -> LanguageModel:
    """Open the model named by `config.llm`; the last one opened is kept. Raises UserError when it cannot be loaded."""
    if config.served:
        from cratescope.llm.server import ServerLLM

        return ServerLLM.open(config)
    from cratescope.llm.local import LocalLLM

    return LocalLLM.open(config)


def llm_identity(config: LLMConfig, llm: LanguageModel | None) -> dict[str, str]:
    """Identity of the model in results, known without opening it."""
    if llm is not None:
        return {"llm": llm.name, "dtype": llm.dtype}
    return {"llm": config.llm_name, "dtype": config.number_format}
