"""Noise that depends only on a request: it is the same for every batch, device and order of requests.

It is counter-based, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": number i of a request is a
hash of its seed and i, here splitmix64 (Steele et al. 2014). There is no state, so models and paths are drawn together.
"""

import torch

BITS = 23  #: bits of a uniform number, so that it and its distance to 0 and 1 are exact in float32


def draw_normals(seeds: torch.Tensor, paths: int, steps: int) -> torch.Tensor:
    """Draw standard normals [N, paths, steps] for the first two numbers of the seed channel [N, 2], of 24 bits each."""
    key = _mix_bits((seeds[:, :1].long() << 24) + seeds[:, 1:2].long())
    counters = torch.arange(1, paths * steps + 1, device=seeds.device)
    whole = _shift_right(_mix_bits(key + counters * _as_signed(0x9E3779B97F4A7C15)), 64 - BITS)
    uniform = (whole.to(torch.float32) + 0.5) * 2.0**-BITS
    found: torch.Tensor = torch.special.ndtri(uniform)
    return found.view(-1, paths, steps)


def _mix_bits(z: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of splitmix64, in integers that wrap around."""
    z = (z ^ _shift_right(z, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _as_signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right, filling with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _as_signed(constant: int) -> int:
    return constant - (1 << 64)
