"""The network for vectors."""

import torch

from momatch.networks.configs import MLPConfig
from momatch.networks.mlp import MLP


def test_starts_at_zero_and_every_parameter_learns() -> None:
    network = MLP(MLPConfig(dim=3, width=16, depth=2, num_classes=4, embedding_dim=8))
    z, logsnr, cond = torch.randn(5, 3), torch.randn(5), {"label": torch.tensor([0, 1, 2, 3, 4])}
    assert torch.equal(network(z, logsnr, cond), torch.zeros(5, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):  # the zero layers let gradients through one after the other
        optimizer.zero_grad()
        (network(z, logsnr, cond) - z).square().mean().backward()
        optimizer.step()
    assert all(bool(p.grad is not None and p.grad.abs().max() > 0) for p in network.parameters())


def test_no_condition_is_the_null_label() -> None:
    network = MLP(MLPConfig(dim=2, width=16, depth=1, num_classes=4, embedding_dim=8))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z, logsnr = torch.randn(5, 2), torch.randn(5)
    torch.testing.assert_close(network(z, logsnr), network(z, logsnr, {"label": torch.full((5,), 4)}))
    assert not torch.allclose(
        network(z, logsnr), network(z, logsnr, {"label": torch.zeros(5, dtype=torch.int64)})
    )


def test_forward_mode_agrees_with_central_difference() -> None:
    network = MLP(MLPConfig(dim=2, width=16, depth=2, embedding_dim=8)).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z, logsnr = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in network.named_parameters()}
    direction = {k: torch.randn_like(v) for k, v in parameters.items()}

    def at(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(network, p, (z, logsnr))

    product = torch.func.jvp(at, (parameters,), (direction,))[1]
    ends = [at({k: v + sign * 1e-6 * direction[k] for k, v in parameters.items()}) for sign in (1, -1)]
    torch.testing.assert_close(product, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)
