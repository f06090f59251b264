"""An adaptive order-3 byte model: a classical compressor's prediction, to compare ours with.

The probability of a byte after its three predecessors is interpolated with that after two, one and
none, and at last with 1/256, by the weights of Witten and Bell (the escape of PPM, method C): after
a context seen `total` times with `kinds` different bytes next,

    p_n(byte) = (count(byte) + kinds * p_{n-1}(byte)) / (total + kinds)
"""

import math

import numpy as np

ORDER = 3


class ByteModel:
    def __init__(self, text: bytes):
        """Counts every byte of `text` after its up to three predecessors."""
        self.tail = int.from_bytes(text[-ORDER:], "big")
        values = np.frombuffer(text, dtype=np.uint8).astype(np.uint32)
        self.counts, self.totals, self.kinds = [], [], []
        for order in range(ORDER + 1):
            # A context and the byte after it as one number, the latest byte lowest.
            keys = np.zeros(len(values) - order, dtype=np.uint32)
            for distance in range(order + 1):
                keys |= values[order - distance : len(values) - distance] << np.uint32(8 * distance)
            keys, counts = np.unique(keys, return_counts=True)
            contexts, first, kinds = np.unique(keys >> 8, return_index=True, return_counts=True)
            totals = np.add.reduceat(counts, first)
            self.counts.append(dict(zip(keys.tolist(), counts.tolist())))
            self.totals.append(dict(zip(contexts.tolist(), totals.tolist())))
            self.kinds.append(dict(zip(contexts.tolist(), kinds.tolist())))

    def bits(self, text: bytes) -> float:
        """Bits that `text` takes; the model learns each byte after it has predicted it."""
        history, bits = self.tail, 0.0
        tables = list(zip(range(ORDER + 1), self.counts, self.totals, self.kinds))
        for byte in text:
            probability = 1 / 256
            for order, counts, totals, kinds in tables:
                context = history & ((1 << 8 * order) - 1)
                key = context << 8 | byte
                count, total = counts.get(key, 0), totals.get(context, 0)
                new = kinds.get(context, 0)
                if total:
                    probability = (count + new * probability) / (total + new)
                counts[key] = count + 1
                totals[context] = total + 1
                kinds[context] = new + (count == 0)
            bits -= math.log2(probability)
            history = (history << 8 | byte) & 0xFFFFFF
        return bits
