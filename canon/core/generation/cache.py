"""The key and value memory of a decoder, laid out for the single-query attention that decoding consists of.

One token a row attends to everything before it, so a step reads the whole memory once and does next to no arithmetic:
its speed is that of memory. Measured for batch 256, 4 heads of 64 and 80 keys in bfloat16 on one core:
`scaled_dot_product_attention` 9.7 ms, two batched matrix products over a slice of a longer buffer 5.4 ms, over
contiguous keys and values 1.7 ms, the kernel in `attention.c` 1.4 ms (and twice as fast on two cores, which the
products are not). The kernel serves where there is a C compiler; the products elsewhere, so the filled part is kept
(nearly) contiguous: the capacity grows in blocks, and the unused end of the last block is masked.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from canon.core.errors import UserError
from canon.core.generation import attention
from canon.core.nn.attention import causal_attention

BLOCK = 32
"""Keys by which the capacity grows, at least; an eighth of the length where that is more (amortised copies)."""


class KVCache:
    """Keys and values of every layer for a batch of rows, whose lengths may differ.

    The memory is reserved once, for ``max_length`` tokens a row; the pages of it that are never reached are never
    touched. A layer calls :meth:`attend` (or :meth:`mask` and :meth:`update`), the model calls :meth:`advance` after
    its last layer. Prompts of different lengths are padded on the right; afterwards ``lengths`` is set to the true
    lengths, and later tokens overwrite the padding.

    Args:
        n_layers: layers of the decoder.
        batch: rows.
        n_kv_heads: key/value heads of a layer.
        max_length: tokens a row can hold.
        d_head: width of a head.
        dtype: element type of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        max_length: int,
        d_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.n_layers, self.n_kv_heads, self.max_length, self.d_head = n_layers, n_kv_heads, max_length, d_head
        # Slot 2l holds the keys of layer l, slot 2l + 1 its values; the last buffer is the spare that a slot moves to.
        size = batch * n_kv_heads * max_length * d_head
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2 * n_layers + 1)]
        self._slots = [self._view(buffer, batch, 0) for buffer in self._buffers[:-1]]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._lengths)

    @property
    def filled(self) -> int:
        """Tokens stored in the longest row."""
        return self._filled

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens stored, per row. Setting it forgets what lies beyond."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Int[Tensor, " batch"]) -> None:
        self._lengths = lengths
        self._filled = int(lengths.max()) if len(lengths) else 0
        self._even = len(lengths) == 0 or int(lengths.min()) == self._filled
        self._mask: tuple[int, int, Tensor | None] | None = None

    def rewind(self, lengths: Int[Tensor, " batch"] | Sequence[int]) -> None:
        """Forget all tokens of each row but its first ``lengths``.

        Raises:
            ValueError: a row does not hold as many.
        """
        wanted = torch.as_tensor(lengths, dtype=torch.long, device=self._lengths.device)
        if wanted.shape != self._lengths.shape or bool((wanted > self._lengths).any()) or bool((wanted < 0).any()):
            raise ValueError(f"cannot rewind rows of {self._lengths.tolist()} tokens to {wanted.tolist()}")
        self.lengths = wanted

    def select(self, rows: Int[Tensor, " rows"] | Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was: reorders (beam search), drops or repeats rows."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self._lengths.device)
        size = len(index) * self.n_kv_heads * self.max_length * self.d_head
        grown = size > len(self._buffers[-1])
        for slot, old in enumerate(self._slots):
            if grown:  # more rows than were reserved
                self._buffers[-1] = old.new_empty(size)
            new = self._view(self._buffers[-1], len(index), old.shape[2])
            torch.index_select(old, 0, index, out=new)
            self._swap(slot, new)
        if grown:
            self._buffers[-1] = self._buffers[-1].new_empty(size)
        self.lengths = self._lengths[index]

    def positions(self, time: int) -> Int[Tensor, "batch time"]:
        """Positions of the next ``time`` tokens of each row, counted from 0."""
        return self._lengths[:, None] + torch.arange(time, device=self._lengths.device)

    def mask(self, time: int) -> Bool[Tensor, "batch 1 time filled"] | None:
        """Which keys each of the next ``time`` tokens may see, True meaning yes; None if all that there are.

        A key is seen when its index is at most the query's position, which also hides the padding of short rows.
        """
        if time == 1 and self._even:
            return None
        return self._visible(time, self._filled + time)

    def update(
        self, layer: int, k: Float[Tensor, "batch kv_heads time d_head"], v: Float[Tensor, "batch kv_heads time d_head"]
    ) -> tuple[Float[Tensor, "batch kv_heads filled d_head"], Float[Tensor, "batch kv_heads filled d_head"]]:
        """Store the keys and values of the next tokens; returns those of all tokens so far.

        Raises:
            UserError: a row would outgrow ``max_length``.
        """
        filled = self._filled + k.shape[2]
        keys, values = self._store(2 * layer, k), self._store(2 * layer + 1, v)
        return keys[:, :, :filled], values[:, :, :filled]

    def reserve(self, time: int) -> list[Tensor]:
        """Make room for the next ``time`` tokens and return the memory itself, for a decoder that writes it.

        Returns:
            Keys and values of the first layer, then of the second, and so on: (batch, kv_heads, capacity, d_head) each.

        Raises:
            UserError: a row would outgrow ``max_length``.
        """
        for slot in range(len(self._slots)):
            self._make_room(slot, time)
        return self._slots

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch heads time d_head"],
        k: Float[Tensor, "batch kv_heads time d_head"],
        v: Float[Tensor, "batch kv_heads time d_head"],
    ) -> Float[Tensor, "batch heads time d_head"]:
        """Store the keys and values of the next tokens and attend to all tokens so far, causally.

        Several query heads may share one key/value head (Ainslie et al., 2023): head h reads head
        ``h * kv_heads // heads``.

        Raises:
            UserError: a row would outgrow ``max_length``.
        """
        time = q.shape[2]
        if time == 1 and attention.applies(q, k, v, self._slots[0]):
            self._make_room(2 * layer, time)
            self._make_room(2 * layer + 1, time)
            return attention.attend_one(q, k, v, self._slots[2 * layer], self._slots[2 * layer + 1], self._lengths)
        keys, values = self._store(2 * layer, k), self._store(2 * layer + 1, v)
        if time == 1:
            return self._attend_one(q, keys, values)
        if self._filled == 0:  # nothing before: plain causal attention, in which padding on the right is never seen
            return causal_attention(q, k, v)
        filled = self._filled + time
        seen = keys[:, :, :filled], values[:, :, :filled], self._visible(time, filled)
        return F.scaled_dot_product_attention(q, *seen, enable_gqa=q.shape[1] != k.shape[1])

    def advance(self, time: int) -> None:
        """Count the ``time`` tokens stored by every layer as part of the past."""
        self._lengths = self._lengths + time
        self._filled += time
        self._mask = None

    def _attend_one(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, heads, _, d_head = q.shape
        kv_heads, capacity = keys.shape[1:3]
        # One matrix product per row and key/value head, of the query heads that share it; scale and mask fused into it.
        q = q.reshape(batch * kv_heads, heads // kv_heads, d_head)
        hidden = self._hidden(capacity, q.dtype)
        if not self._even:
            hidden = hidden.repeat_interleave(kv_heads, 0)
        scores = torch.baddbmm(hidden, q, keys.flatten(0, 1).transpose(1, 2), alpha=d_head**-0.5)
        return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(batch, heads, 1, d_head)

    def _hidden(self, capacity: int, dtype: torch.dtype) -> Tensor:
        """0 for each key that the next token sees, else minus infinity: (batch or 1, 1, capacity)."""
        if self._mask is None or self._mask[:2] != (-1, capacity):  # the same for every layer of a step
            last = self._lengths[:1] if self._even else self._lengths
            keys = torch.arange(capacity, device=last.device)
            hidden = torch.zeros(len(last), capacity, dtype=dtype, device=last.device)
            self._mask = -1, capacity, hidden.masked_fill_(keys > last[:, None], -math.inf)[:, None]
        assert self._mask[2] is not None
        return self._mask[2]

    def _visible(self, time: int, filled: int) -> Tensor:
        if self._mask is None or self._mask[:2] != (time, filled):
            keys = torch.arange(filled, device=self._lengths.device)
            self._mask = time, filled, (keys <= self.positions(time)[..., None])[:, None]
        assert self._mask[2] is not None
        return self._mask[2]

    def _store(self, slot: int, new: Tensor) -> Tensor:
        """Write (batch, kv_heads, time, d_head) behind the past of each row; returns the whole slot."""
        time = new.shape[2]
        filled = self._make_room(slot, time)
        memory = self._slots[slot]
        if self._even:
            memory[:, :, self._filled : filled] = new
        else:
            rows = torch.arange(len(new), device=new.device)[:, None]
            memory[rows, :, self.positions(time)] = new.transpose(1, 2)
        return memory

    def _make_room(self, slot: int, time: int) -> int:
        """Let a slot hold ``time`` more tokens; returns how many that is in all."""
        filled = self._filled + time
        if filled > self.max_length:
            raise UserError(
                f"{filled} tokens do not fit into a key-value cache of max_length={self.max_length}; "
                "ask for a larger one, or for fewer tokens"
            )
        if filled > self._slots[slot].shape[2]:
            self._grow(slot, filled)
        return filled

    def _grow(self, slot: int, filled: int) -> None:
        old = self._slots[slot]
        # Whole blocks: products over an odd number of keys are slower than over the next multiple of 32.
        capacity = min(self.max_length, math.ceil((filled + filled // 8) / BLOCK) * BLOCK)
        new = self._view(self._buffers[-1], len(old), capacity)
        new[:, :, : old.shape[2]] = old
        new[:, :, old.shape[2] :] = 0  # masked keys have weight 0, and 0 times a stray NaN would not be 0
        self._swap(slot, new)

    def _swap(self, slot: int, new: Tensor) -> None:
        self._slots[slot] = new
        self._buffers[slot], self._buffers[-1] = self._buffers[-1], self._buffers[slot]

    def _view(self, buffer: Tensor, batch: int, capacity: int) -> Tensor:
        shape = (batch, self.n_kv_heads, capacity, self.d_head)
        return buffer[: math.prod(shape)].view(shape)
