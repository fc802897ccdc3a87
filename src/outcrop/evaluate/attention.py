"""Attention for packed rows: each record of a row attends to itself only.

Registers a function with transformers, which any of its models can then be told to use. Who sees
whom inside a record is the model's own rule (causal, with a sliding window, in chunks): it is asked
for places that begin anew with each record. The rule goes through the model in the place of a mask,
and the lengths of the row's records with it. What torch offers ready-made is kept for long records;
for short ones it is slow on a CPU (its backward pass makes many tiny matrix products), so those are
computed with a few larger ones.

A model that cannot be packed so is refused, never computed wrongly: before its first row, two short
records are computed together and each alone with the model's own attention, and what a model hands
to attention must be known here.

Axis suffixes: B rows (always 1), N heads, G heads of keys and values, T tokens of the row,
S tokens of one record, H width of a head.

Source: transformers' AttentionInterface and AttentionMaskInterface for the arguments and the axes
of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from outcrop.errors import ModelError
from outcrop.models.kernels import wide

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKED_ATTENTION = "outcrop_packed"
SHORT_RECORD_TOKENS = 256
"""Up to here whole score matrices are faster than torch's own: forward and backward of 1900 tokens
took 24 instead of 70 ms in records of 60 or 120, 39 instead of 55 ms in records of 235, and no less
in records of 400 (one layer of 9 heads, bfloat16, one core of a Xeon with AMX)."""
WITHOUT_EFFECT = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "output_attentions"),
        *("output_hidden_states", "return_dict", "layer_idx"),
    }
)
"""Arguments that models hand through to attention, which no attention of transformers reads."""
PROBE_LENGTHS = (7, 5)
"""Tokens of the records that a model is tried with."""
PROBE_TOLERANCE = 1e-3
"""How far the hidden states of the try may differ, of their length: it computes in float32. In
bfloat16 they differ by a quarter and more from one of transformers' attentions to another, for
tokens that a trained model did not expect after each other."""

_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths")
"""Tokens of each record of the row that is being computed."""
_tried: WeakSet[nn.Module] = WeakSet()


@contextmanager
def packed_attention(model: LlamaForCausalLM) -> Iterator[None]:
    """Make the model take packed rows inside a `with`, and give its own attention back after.

    Raises:
        ModelError: records in one row would not be independent of each other, or attention would
            not be the model's own; found out once for each model.
    """
    if model not in _tried:
        _try(model)
        _tried.add(model)
    with _attention_of(model, PACKED_ATTENTION):
        yield


def packed_states(
    model: LlamaForCausalLM,
    input_ids: Sequence[int],
    position_ids: Sequence[int],
    segment_lengths: Sequence[int],
) -> Tensor:
    """Return the hidden states of a packed row before the head, (T, width).

    The model must be inside `packed_attention`.

    Raises:
        ModelError: the model would rotate a record by what was computed before it.
    """
    if _turns_by_length(model, max(segment_lengths)) and len(segment_lengths) > 1:
        parts, first = [], 0
        for length in segment_lengths:
            own = slice(first, first + length)
            parts.append(packed_states(model, input_ids[own], position_ids[own], [length]))
            first += length
        return torch.cat(parts)
    decoder: Any = model.get_decoder()
    device = decoder.device
    token = _lengths.set(tuple(segment_lengths))
    try:
        hidden_BTD: Tensor = decoder(
            input_ids=torch.tensor([input_ids], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            # Nothing is filled up. Without it, transformers would look for records by itself.
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.long, device=device),
            use_cache=False,
        ).last_hidden_state
    finally:
        _lengths.reset(token)
    return hidden_BTD[0]


def _turns_by_length(model: LlamaForCausalLM, longest: int) -> bool:
    """Return whether a record of such a length changes how all records of its row are rotated.

    Source: transformers' modeling_rope_utils, dynamic_rope_update: "longrope" takes other
    frequencies for a row with a place past the original length; "dynamic" those for the longest row
    so far.
    Raises:
        ModelError: the second.
    """
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope] if "rope_type" in rope else filter(None, rope.values()):
        original = kind.get("original_max_position_embeddings") or config.max_position_embeddings
        if "dynamic" in kind["rope_type"] and longest > config.max_position_embeddings:
            raise ModelError(
                f"A record has {longest} tokens. This {config.model_type} model, whose rotation is "
                f"dynamic, would compute those past {config.max_position_embeddings} by what came "
                "before: shorten the record."
            )
        if kind["rope_type"] == "longrope" and longest > original:
            return True
    return False


class Rule:
    """Who sees whom inside a record, as a model asks for it."""

    def __init__(
        self, lengths: Sequence[int], sees: Callable[..., Tensor], device: torch.device
    ) -> None:
        """
        Args:
            lengths: of the row's records, in tokens.
            sees: (row, head, places of queries, places of keys) -> whether they see them.
        """
        self.lengths = list(lengths)
        self._sees, self._device = sees, device
        self._seen_SS = torch.zeros(0, 0, dtype=torch.bool)
        self._num_causal = 0

    def seen(self, length: int) -> Tensor | None:
        """Return which keys each query of a record sees, (S, S); None: all up to its own place.

        Raises:
            ModelError: a query sees a key after it, so that no loss of it would mean anything.
        """
        if length > len(self._seen_SS):
            zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=self._device)
            places = torch.arange(length, device=self._device)
            seen = self._sees(zero, zero, places[None, None, :, None], places[None, None, None, :])
            self._seen_SS = seen.expand(1, 1, length, length)[0, 0]
            causal_SS = torch.ones_like(self._seen_SS).tril_()
            if (self._seen_SS & ~causal_SS).any():
                raise ModelError("its attention looks to both sides.")
            departs_S = (self._seen_SS != causal_SS).any(1)
            self._num_causal = int(departs_S.nonzero()[0, 0]) if departs_S.any() else length
        return None if length <= self._num_causal else self._seen_SS[:length, :length]


def make_rule(
    *, mask_function: Callable[..., Tensor], device: torch.device, use_vmap: bool = False, **_: Any
) -> Rule:
    """Take a model's rule instead of a mask of the whole row.

    Raises:
        ModelError: it is one that is not computed from places alone, such as that of attention to
            both sides.
    """
    if use_vmap:
        raise ModelError("who sees whom is not told by places in a record alone.")
    lengths = _lengths.get(())
    if not lengths:
        raise ModelError("its attention is asked for outside of its decoder.")
    return Rule(lengths, mask_function, device)


def attend(
    module: nn.Module,
    query_BNTH: Tensor,
    key_BGTH: Tensor,
    value_BGTH: Tensor,
    attention_mask: Rule,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output, (B, T, N, H), for the records of a row.

    Args:
        attention_mask: the model's rule, with the records' lengths.
        scaling: what scores are multiplied by; None means 1 / sqrt(H).
        dropout: must be 0: nothing here is trained with it.
        softcap: scores go through softcap * tanh(score / softcap), after the scaling.
        sliding_window: is in the rule already.
        others: must be known to have no effect, or be None.
    Raises:
        ModelError: the model wants something of attention that is not done here.
    """
    assert dropout == 0.0
    strange = [name for name, value in others.items() if value is not None]
    strange = [name for name in strange if name not in WITHOUT_EFFECT]
    if strange:
        raise ModelError(f"its attention takes {', '.join(strange)}, which is not known here.")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ModelError("its attention looks to both sides.")
    if not isinstance(attention_mask, Rule):
        raise ModelError("its attention has a mask that is not made by transformers' rules.")
    scale = query_BNTH.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = attention_mask.lengths
    outputs = [
        _one_record(query, key, value, scale, softcap, attention_mask.seen(query.shape[2]))
        for query, key, value in zip(
            query_BNTH.split(lengths, dim=2),
            key_BGTH.split(lengths, dim=2),
            value_BGTH.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, attend)
AttentionMaskInterface.register(PACKED_ATTENTION, make_rule)


def _one_record(
    query_BNSH: Tensor,
    key_BGSH: Tensor,
    value_BGSH: Tensor,
    scale: float,
    softcap: float | None,
    seen_SS: Tensor | None,
) -> Tensor:
    # torch's own has no cap for scores.
    if query_BNSH.shape[2] > SHORT_RECORD_TOKENS and softcap is None:
        return nn.functional.scaled_dot_product_attention(
            *(query_BNSH, key_BGSH, value_BGSH, seen_SS),
            is_causal=seen_SS is None,
            scale=scale,
            enable_gqa=True,
        )
    apply: Callable[..., Tensor] = _ShortAttention.apply
    return apply(query_BNSH[0], key_BGSH[0], value_BGSH[0], scale, softcap, seen_SS)[None]


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * Q K^T, masked) V with whole matrices; heads that share a key are stacked."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NSH: Tensor,
        key_GSH: Tensor,
        value_GSH: Tensor,
        scale: float,
        softcap: float | None,
        seen_SS: Tensor | None,
    ) -> Tensor:
        num_heads, length, width = query_NSH.shape
        num_groups = key_GSH.shape[0]
        stacked = (num_groups, num_heads // num_groups * length)
        query, key, value = query_NSH.reshape(*stacked, width), key_GSH, value_GSH
        scores = torch.bmm(query, key.transpose(1, 2)).to(wide(query.dtype)).mul_(scale)
        slope = None
        if softcap is not None:
            scores = scores.div_(softcap).tanh_()
            slope = (1 - scores.square()).to(query.dtype)
            scores = scores.mul_(softcap)
        if seen_SS is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        else:
            hidden = ~seen_SS
        scores.view(num_groups, -1, length, length).masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights, slope)
        ctx.scale = scale
        return torch.bmm(weights, value).view(num_heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output_NSH,) = grad_outputs
        query, key, value, weights, slope = ctx.saved_tensors
        grad_output = grad_output_NSH.reshape(*query.shape[:2], -1)
        grad_value = torch.bmm(weights.transpose(1, 2), grad_output)
        grad_weights = torch.bmm(grad_output, value.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        ).mul_(ctx.scale)
        if slope is not None:
            grad_scores *= slope
        grad_query = torch.bmm(grad_scores, key).view(*grad_output_NSH.shape[:2], -1)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
        return grad_query, grad_key, grad_value, None, None, None


@contextmanager
def _attention_of(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def _wide_weights(decoder: nn.Module) -> Iterator[None]:
    """Let each part of a decoder compute in float32 at least; one after the other has its weights
    widened while it runs, so that a large model is not held twice."""
    narrow: list[tuple[Tensor, Tensor]] = []

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype != wide(parameter.dtype):
                narrow.append((parameter, parameter.data))
                parameter.data = parameter.data.to(wide(parameter.dtype))

    def restore(*_: Any) -> None:
        for parameter, data in narrow:
            parameter.data = data
        narrow.clear()

    def widen_rows(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
        return rows.to(wide(rows.dtype))

    handles = []
    for module in _owners(decoder):
        if isinstance(module, nn.Embedding):  # some rows of a table that may be gigabytes
            handles.append(module.register_forward_hook(widen_rows))
            continue
        handles.append(module.register_forward_pre_hook(widen))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that have parameters of their own."""
    if module._parameters:
        yield module
        return
    for child in module.children():
        yield from _owners(child)


@torch.no_grad()
def _try(model: LlamaForCausalLM) -> None:
    """Compare two records in one row with each alone under the model's own attention.

    Source: what can make them differ: state that runs on from token to token, positions that are
    not those given, attention that is not transformers' interface.
    """
    cannot = f"A {model.config.model_type} model cannot be trained or evaluated here: "
    first, second = PROBE_LENGTHS
    ids = [number % model.config.vocab_size for number in range(3, 3 + first + second)]
    places = [*range(first), *range(second)]
    decoder: Any = model.get_decoder()
    try:
        with _wide_weights(decoder):
            with _attention_of(model, PACKED_ATTENTION):
                together_TD = packed_states(model, ids, places, PROBE_LENGTHS)
            alone_TD = torch.cat(
                [
                    decoder(
                        input_ids=torch.tensor([part], device=together_TD.device), use_cache=False
                    ).last_hidden_state[0]
                    for part in (ids[:first], ids[first:])
                ]
            )
    except ModelError as error:
        raise ModelError(f"{cannot}{error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(
            f"{cannot}its definition in transformers does not let attention be replaced."
        ) from error
    together_TD, alone_TD = together_TD.double(), alone_TD.double()
    difference_T = (together_TD - alone_TD).norm(dim=1) / alone_TD.norm(dim=1)
    # Not a number: the weights are to blame, which the loss will tell.
    if bool((difference_T > PROBE_TOLERANCE).any()):
        raise ModelError(
            f"{cannot}records in one row would not be independent of each other: the hidden states "
            f"differ by {float(difference_T.max()):.1%} from those of each record alone."
        )
