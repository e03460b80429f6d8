"""Settings of the language model that explains, simulates and judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cratescope.hardware import pick_device, pick_dtype
from cratescope.options import LARGEST_BATCH, Checked, within


@dataclass(frozen=True)
class LLMConfig(Checked):
    """The language model that explains or simulates."""

    llm: str = "offline"
    """`offline` (SmolLM2-135M-Instruct from the package registry), a hub name, a model folder, a .gguf file, or the
    address of an OpenAI-compatible server such as http://127.0.0.1:8000/v1."""
    llm_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run it on."""
    llm_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto uses bfloat16 where the hardware supports it."""
    llm_quantize: Literal["none", "4bit"] = "none"
    """4bit quantises the weights to 4 bits (needs CUDA and pip install bitsandbytes)."""
    llm_device_map: Literal["one", "auto"] = "one"
    """auto spreads the layers over all GPUs."""
    llm_batch: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Prompts per forward pass."""
    llm_max_tokens: Annotated[int | None, within(1)] = None
    """Longest answer in tokens (paper: 60, the default); a model that reasons first needs 2000 or more."""
    llm_model: str = ""
    """Server: which of its models to use; also the explainer's name in files."""
    llm_tokenizer: str = ""
    """Server: hub name or folder of the model's tokenizer; required to simulate."""
    llm_chat: bool = False
    """Server: use /chat/completions (explanations only)."""
    llm_concurrency: Annotated[int, within(1, 4096)] = 8
    """Server: number of concurrent requests."""
    llm_per_minute: Annotated[int | None, within(1)] = None
    """Server: largest number of requests per minute."""
    llm_timeout: Annotated[int, within(1, 86_400)] = 120
    """Server: seconds to wait for an answer before the request is retried."""
    llm_key_env: str = "OPENAI_API_KEY"
    """Server: environment variable that holds the API key."""

    @property
    def served(self) -> bool:
        """Whether the model runs on a server."""
        return self.llm.lower().startswith(("http://", "https://"))

    @property
    def number_format(self) -> str:
        """Number format of the weights, known without opening the model; part of a result's identity."""
        if self.served:
            return "served"
        if self.llm_quantize != "none":
            return self.llm_quantize
        return str(pick_dtype(self.llm_dtype, pick_device(self.llm_device))).removeprefix("torch.")

    @property
    def llm_name(self) -> str:
        """Name used in files; a server's address can change."""
        return self.llm_model if self.served else self.llm
