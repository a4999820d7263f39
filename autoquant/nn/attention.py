"""Quantized multi-head attention, and how to keep torch's fused paths from bypassing it.

The projections take their weights from sites, and the attention itself runs in public operators,
never in ``torch._native_multi_head_attention``, which reads the float parameters directly.

Equations: Vaswani et al. 2017, arXiv 1706.03762, section 3.2, with the masks, the optional bias
and the optional zero at the end of keys and values, of torch.nn.MultiheadAttention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.nn.converted import Converted
from autoquant.nn.runtime import Multiply, Rows


class QuantizedMultiheadAttention:
    """One call of multi-head attention with quantized projections.

    The sites are ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``;
    ``out_proj`` is a layer of its own, and is called as one.
    """

    def __init__(self, converted: Converted) -> None:
        self.layer: Any = converted.module
        self.sites = converted.sites
        self.rest = converted.rest

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, attention weights or None) in the shapes of ``nn.MultiheadAttention``.

        Raises UserError for nested tensors, and RuntimeError for ``is_causal`` with no mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise UserError(
                "quantized attention takes no nested tensors: "
                "pass padded tensors and a key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal is only a hint about attn_mask, and there is no attn_mask"
            )
        query, key, value = self._rounded(query, key, value)
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask, is_causal = self._mask(attn_mask, key_padding_mask, q), False
        k, v, mask = self._extend(k, v, mask)
        dropout = self.layer.dropout if self.layer.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.size(-1))) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            if dropout:
                weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self.layer.out_proj(self._join(heads, batched)), weights

    def _rounded(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return what is given in the format of the rest; what is the same stays the same."""
        if self.rest is None:
            return given
        once = {id(x): x.to(self.rest) for x in given}
        return tuple(once[id(x)] for x in given)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections of the quantized ``query``, ``key`` and ``value``.

        A tensor that is passed more than once in a row is quantized and projected once.
        """
        bias = self.layer.in_proj_bias
        if not self.layer._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                self._products(name, None)[0](x, b)
                for name, x, b in zip(names, (query, key, value), biases, strict=True)
            )
            return q, k, v
        size = self.layer.embed_dim
        if query is key and key is value:
            (product,) = self._products("in_proj_weight", None)
            q, k, v = product(query, bias).chunk(3, -1)
            return q, k, v
        # Inputs that are the same and lie side by side in the weight share a product.
        if query is key:
            cuts: tuple[tuple[int, int], ...] = ((0, 2 * size), (2 * size, 3 * size))
            inputs: tuple[Tensor, ...] = (query, value)
        elif key is value:
            cuts, inputs = ((0, size), (size, 3 * size)), (query, key)
        else:
            cuts = ((0, size), (size, 2 * size), (2 * size, 3 * size))
            inputs = (query, key, value)
        outputs = [
            product(x, None if bias is None else bias[slice(*cut)])
            for product, x, cut in zip(
                self._products("in_proj_weight", *cuts), inputs, cuts, strict=True
            )
        ]
        q, k, v = (part for y in outputs for part in y.split(size, -1))
        return q, k, v

    def _products(self, name: str, *parts: Rows) -> tuple[Multiply, ...]:
        """Return the products with the weight ``name``, with each of some of its rows."""
        if name in self.sites:
            return self.sites[name].linear(*parts)
        weight = getattr(self.layer, name)

        def product(rows: Rows) -> Multiply:
            part = weight if rows is None else weight[slice(*rows)]
            return lambda x, bias: F.linear(x, part, bias)

        return tuple(map(product, parts))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return a projection, laid out as the inputs are, as [batch, heads, length, head_dim]."""
        x = x.unflatten(-1, (self.layer.num_heads, self.layer.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.layer.batch_first else x.permute(1, 2, 0, 3)

    def _join(self, x: Tensor, batched: bool) -> Tensor:
        """Return [batch, heads, length, head_dim] laid out as the inputs are."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.layer.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """Return both masks as one to be added to scores [batch, heads, queries, keys]."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.size(0), self.layer.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            padding = padding.reshape(q.size(0), 1, 1, padding.size(-1))
            mask = padding if mask is None else mask + padding
        return mask

    def _extend(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned bias and the zero, each one key that every query may see."""
        extra = 0
        if self.layer.bias_k is not None and self.layer.bias_v is not None:
            shape = (1, 1, self.layer.num_heads, self.layer.head_dim)
            k, v = (
                torch.cat([x, b.view(shape).transpose(1, 2).expand(x.size(0), -1, -1, -1)], 2)
                for x, b in ((k, self.layer.bias_k), (v, self.layer.bias_v))
            )
            extra += 1
        if self.layer.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra))
        return k, v, mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to be added to scores; in a Boolean one True means "may not be seen"."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"an attention mask is Boolean or floating point, not {mask.dtype}")
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def disable_fast_path(model: nn.Module) -> None:
    """Make torch's transformer encoders in ``model`` compute layer by layer, in evaluation too.

    In evaluation ``nn.TransformerEncoderLayer`` runs one fused operator on the parameters of its
    sublayers, which would skip whatever has replaced those; here it calls the sublayers, as it does
    in training. ``nn.TransformerEncoder`` drops padding by nested tensors for the fused operator,
    and its result is 0 there before the last norm; that is kept (see ``_blank_padding``).
    Doing this twice changes nothing more.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Read for nothing but the choice of the fused operator; the function itself stays.
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            module.use_nested_tensor = False
            module.register_forward_hook(_blank_padding, prepend=True, with_kwargs=True)


def _blank_padding(
    encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return an encoder's output with its padding as the nested-tensor path would leave it.

    That path is taken in evaluation for a batch whose padding is all at the end, with no mask but
    that of the padding. A model that pools over all positions depends on it.
    """
    given = dict(zip(("src", "mask", "src_key_padding_mask", "is_causal"), args, strict=False))
    given.update(kwargs)
    padding = given.get("src_key_padding_mask")
    if padding is None or given.get("mask") is not None or encoder.layers[0].training:
        return output
    if output.dim() != 3 or torch.is_autocast_enabled():
        return output
    if not torch.backends.mha.get_fastpath_enabled():
        return output
    if padding.is_floating_point():
        # The nested path keeps entries whose additive mask is 0.
        padding = padding != 0
    at_end = (padding[:, 1:] | ~padding[:, :-1]).all()
    blank = output.new_zeros(output.size(-1))
    if encoder.norm is not None:
        blank = encoder.norm(blank)
    return torch.where((padding & at_end).unsqueeze(-1), blank, output)
