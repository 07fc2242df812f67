"""Validated options: what the server was started with and what a request asks for.

Knows nothing of models, tensors or HTTP. Every value is checked on construction, and the message
of the error carries the value and the remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from server.errors import ConfigError, InvalidRequestError

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8"]
CompileName = Literal["auto", "on", "off"]

SHIPPED_HEADS = ("medusa", "mtp")
# Values of `EngineConfig` by field.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "device": get_args(DeviceName),
    "dtype": get_args(DtypeName),
    "quantization": get_args(QuantizationName),
    "compile": get_args(CompileName),
}
# As `heads`: the MTP layer that the base checkpoint ships.
NATIVE_HEADS = "native"
MAX_TREE_NODES = 64
MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


def require(ok: bool, param: str, value: object, remedy: str) -> None:
    """Refuse a request's value unless it is right.

    Raises:
        InvalidRequestError: Names the parameter, the value and the remedy.
    """
    if not ok:
        raise InvalidRequestError(f"{param} is {value!r}; {remedy}", param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are drawn from the target distribution.

    Attributes:
        max_tokens: Number of tokens after which generation ends with reason `length`.
        temperature: 0 means greedy; otherwise logits are divided by it.
        top_p: Nucleus mass in (0, 1]; 1 is off.
        top_k: Number of most probable tokens kept; 0 is off.
        min_p: Floor on a token's probability relative to the most probable one; 0 is off.
        presence_penalty: Subtracted from the logit of every token generated before.
        frequency_penalty: Subtracted once per earlier occurrence in the generated text.
        repetition_penalty: Divides positive (multiplies negative) logits of tokens in prompt or
            generated text; 1 is off.
        logit_bias: Token id to a number added to its logit.
        seed: Makes a sampled text reproducible with any drafts and in any batch; implies exact
            acceptance unless the request asks for typical.
        stop: Strings that end generation; they are not part of the text.
        logprobs: Number of most probable tokens to report at each position; None reports nothing.
        ignore_eos: Generate on after an end-of-sequence token.
        processor_options: Options of further logit processors of the server, by their names.

    Raises:
        InvalidRequestError: If a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    processor_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "give at least 1")
        require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "give 0 to 2")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "give more than 0 and at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "give 0 (off) or a positive number")
        require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "give 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2.0 <= value <= 2.0, name, value, "give -2 to 2")
        require(
            0.01 <= self.repetition_penalty <= 10.0,
            "repetition_penalty",
            self.repetition_penalty,
            "give 0.01 to 10 (1 is off)",
        )
        require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} entries",
            f"give at most {MAX_LOGIT_BIAS}",
        )
        for token_id, bias in self.logit_bias.items():
            require(token_id >= 0, "logit_bias", token_id, "give token ids of 0 or more")
            require(-100.0 <= bias <= 100.0, "logit_bias", bias, "give -100 to 100")
        if self.seed is not None:
            require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "give a 64-bit integer")
        require(
            len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            "stop",
            self.stop,
            f"give at most {MAX_STOP_STRINGS} strings, none of them empty",
        )
        if self.logprobs is not None:
            require(
                0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                self.logprobs,
                f"give 0 to {MAX_LOGPROBS}",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every position."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How a request is speculated on.

    Attributes:
        method: Draft source, `medusa`, `mtp` or `lookup`; `auto` takes all that the server has,
            `none` decodes plainly.
        acceptance: `exact` keeps the output distribution; `typical` is Medusa's lossy rule;
            `auto` takes typical for unseeded sampling without log-probs and exact otherwise.
        max_nodes: Largest tree, root included; None takes the server's limit.
        acceptance_options: Parameters of the acceptance rule by name, such as `epsilon` and
            `delta` of typical acceptance; a rule takes its own and its defaults for the rest.

    Raises:
        InvalidRequestError: If a value is out of range. Names are checked against what the server
            has when the request is queued.
    """

    method: str = "auto"
    acceptance: str = "auto"
    max_nodes: int | None = None
    acceptance_options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_nodes is not None:
            require(
                1 <= self.max_nodes <= MAX_TREE_NODES,
                "speculation.max_nodes",
                self.max_nodes,
                f"give 1 to {MAX_TREE_NODES}",
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine is built from.

    Attributes:
        model: Hub id, local directory, `.gguf` file or the built-in `smollm2`.
        heads: Directory of draft heads; `auto` takes those that ship for the model, if any;
            `medusa` and `mtp` insist on that kind of them; `native` takes the MTP layer of the
            model's own checkpoint; `none` serves without heads.
        device: Where the model runs; `auto` takes CUDA if there is a device.
        dtype: Type of weights and activations; `auto` is float32 on CPU and bfloat16 on CUDA.
        quantization: `int8` stores the weights of linear layers in 8 bits, which is faster and a
            little less exact; on CPU with float32 only.
        compile: `on` compiles the model's layers and takes our own kernels for int8 products, draft
            heads and attention, on CPU only, which needs a C++ compiler at the first start; `auto`
            does so where it can; `off` does not.
        attention: Name of an attention backend, or its factory as `module:attribute`; `auto` takes
            the device's best one.
        block_size: Tokens per KV block.
        num_blocks: KV blocks in all; derived from `kv_cache_bytes` if not given.
        kv_cache_bytes: Memory of the KV cache; a share of the free memory if not given.
        max_num_seqs: Sequences that run at once.
        max_tokens_per_step: Tokens of one forward pass, prompt chunks and tree nodes together.
        max_prefill_tokens: Prompt tokens of a step in which other sequences decode, whose streams
            wait for them; if not given 64 on CPU and without a limit of its own on CUDA.
        max_model_len: Longest prompt plus output; the model's own limit if not given.
        max_nodes: Largest draft tree of a sequence, root included.
        tree_size: Nodes of each draft tree, root included; `auto` chooses them for each step by
            the measured step cost.
        lookup: Draft from earlier text of the prompt and the output too.
        acceptance: Rule for requests that ask for `auto`; greedy requests and those with a seed or
            log-probs are exact all the same.
        prefix_caching: Reuse the KV blocks of earlier prompts with the same beginning.
        num_threads: CPU threads of the model; torch's choice if not given.
        remeasure: Measure the step cost even if it is known from an earlier start.

    Raises:
        ConfigError: If a value is unknown or out of range.
    """

    model: str = "smollm2"
    heads: str = "auto"
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    quantization: QuantizationName = "none"
    compile: CompileName = "off"
    attention: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 64
    max_tokens_per_step: int = 512
    max_prefill_tokens: int | None = None
    max_model_len: int | None = None
    max_nodes: int = 32
    tree_size: Literal["auto"] | int = "auto"
    lookup: bool = True
    acceptance: str = "auto"
    prefix_caching: bool = True
    num_threads: int | None = None
    remeasure: bool = False

    def __post_init__(self) -> None:
        positive = {
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "kv_cache_bytes": self.kv_cache_bytes,
            "max_num_seqs": self.max_num_seqs,
            "max_prefill_tokens": self.max_prefill_tokens,
            "max_model_len": self.max_model_len,
            "num_threads": self.num_threads,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words:
                raise ConfigError(f"{name} is {value!r}; give one of {words}")
        if not 1 <= self.max_nodes <= MAX_TREE_NODES:
            raise ConfigError(f"max_nodes is {self.max_nodes}; give 1 to {MAX_TREE_NODES}")
        self._check_tree_size()
        # A step must have room for one full tree of every running sequence's root at least.
        floor = max(self.max_num_seqs, self.max_nodes)
        if self.max_tokens_per_step < floor:
            raise ConfigError(
                f"max_tokens_per_step is {self.max_tokens_per_step}; give at least {floor}, the "
                "larger of max_num_seqs and max_nodes"
            )

    def _check_tree_size(self) -> None:
        size = self.tree_size
        if size == "auto":
            return
        if not 1 <= size <= self.max_nodes:
            raise ConfigError(
                f"tree_size is {size}; give auto or 1 to max_nodes ({self.max_nodes})"
            )
        if self.remeasure:
            raise ConfigError(
                f"remeasure is set, but tree_size {size} needs no step cost; give one of them"
            )
