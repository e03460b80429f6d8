"""CRATE as a Hugging Face model, its GPT-2 twin, presets and the authors' checkpoints.

Importing this package registers `model_type: "crate"` with AutoConfig and AutoModelForCausalLM, and makes
`save_pretrained` write the model's own code beside the weights, so that a saved folder can be published as it is.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cratescope.models.configuration_crate import CrateConfig
from cratescope.models.modeling_crate import CrateForCausalLM, CrateModel

AutoConfig.register("crate", CrateConfig)
AutoModel.register(CrateConfig, CrateModel)
AutoModelForCausalLM.register(CrateConfig, CrateForCausalLM)
CrateConfig.register_for_auto_class()
CrateModel.register_for_auto_class("AutoModel")
CrateForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CrateConfig", "CrateForCausalLM", "CrateModel"]
