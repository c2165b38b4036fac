"""LoRA-FA written in plain PyTorch, for comparison."""

import torch
from torch import Tensor, nn

from vitlorafa.bench.case import SCALE, Case


class PlainLoRA(nn.Module):
    """y = base(x) + s·B(A(x)) for each projection, with A frozen: what people write without a kernel.

    Args:
        base: Pretrained layer.
        case: Case with rank and dropout.
        adapted: For each of the equal parts of the output, whether it is adapted.
    """

    def __init__(self, base: nn.Linear, case: Case, adapted: list[bool]) -> None:
        super().__init__()
        width = base.out_features // len(adapted)
        self.base = base
        self.dropout = nn.Dropout(case.dropout)
        self.A, self.B = nn.ModuleList(), nn.ModuleList()
        self.adapted = adapted
        for _ in range(sum(adapted)):
            A = nn.Linear(base.in_features, case.rank, bias=False).requires_grad_(False)
            B = nn.Linear(case.rank, width, bias=False)
            nn.init.orthogonal_(A.weight)
            nn.init.zeros_(B.weight)
            self.A.append(A)
            self.B.append(B)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer: [..., d_in] -> [..., d_out]."""
        y = self.base(x)
        x = self.dropout(x)
        updates = (SCALE * B(A(x)) for A, B in zip(self.A, self.B, strict=True))
        if len(self.adapted) == 1:
            return y + next(updates)
        zeros = y.new_zeros(*y.shape[:-1], y.shape[-1] // len(self.adapted))
        return y + torch.cat([next(updates) if adapted else zeros for adapted in self.adapted], dim=-1)
