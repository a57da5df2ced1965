"""A tiny causal language model of our own with convolutions along the tokens, known to transformers while tests run."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ConvolutionConfig(PretrainedConfig):
    model_type = "csulora-test-convolution"

    def __init__(self, vocab_size: int = 64, hidden_size: int = 32, num_hidden_layers: int = 2, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class ConvolutionLayer(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(hidden_size, hidden_size, 3, padding=2)  # what is past the tokens is cut off: causal
        self.depthwise = nn.Conv1d(hidden_size, hidden_size, 3, padding=2, groups=hidden_size)
        self.edges = nn.Conv1d(hidden_size, hidden_size, 3, padding=2, padding_mode="replicate")
        self.grouped = nn.Conv1d(hidden_size, hidden_size, 3, padding=2, padding_mode="replicate", groups=4)
        self.wide = nn.Conv1d(hidden_size, hidden_size, 3, padding=4, dilation=2)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        mixed = self.mix(hidden.mT)[..., :tokens].tanh()
        mixed = self.edges(mixed)[..., :tokens] + self.grouped(mixed)[..., :tokens] + self.wide(mixed)[..., :tokens]
        return hidden + self.out(self.depthwise(mixed)[..., :tokens].mT)


class ConvolutionModel(PreTrainedModel, GenerationMixin):
    config_class = ConvolutionConfig

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ConvolutionLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


def register() -> None:
    """Make the automatic classes of transformers know it."""
    AutoConfig.register(ConvolutionConfig.model_type, ConvolutionConfig, exist_ok=True)
    AutoModelForCausalLM.register(ConvolutionConfig, ConvolutionModel, exist_ok=True)


def config(**common: Any) -> ConvolutionConfig:
    """What `conftest.make_host` builds."""
    register()
    return ConvolutionConfig(**common)
