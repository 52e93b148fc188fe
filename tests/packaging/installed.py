"""Run with the interpreter of an installation: is it complete, does it compute, and does it tell the truth about itself?

Usage: python installed.py native|reference triton|no-triton. Needs torch alone. Prints what it found; any failure is an exception.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings


def main(kernels: str, triton: str) -> None:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import cl_kernels as clk

        assert "triton" not in sys.modules, "importing cl_kernels must not import triton"
        assert "site-packages" in clk.__file__, f"not the installed package: {clk.__file__}"
        for _ in range(2):
            check_operations(torch, clk)
    own = [w for w in caught if issubclass(w.category, RuntimeWarning) and "cl_kernels" in str(w.message)]
    assert len(own) == (kernels == "reference"), [str(w.message) for w in own]

    from cl_kernels import doctor

    report = doctor.report()
    assert report["library"]["loaded"] == (kernels == "native"), report["library"]
    assert (importlib.util.find_spec("triton") is not None) == (triton == "triton")
    statuses = clk.backends()
    for operation, status in statuses.items():
        chosen = report["operations"][operation]["chosen"]["cpu"]
        assert chosen == ("cpu" if status["cpu"] == "available" else "reference"), (operation, chosen)
        if kernels == "reference":
            assert "no C++ compiler found" in status["cpu"], status
            assert status["cpu"] in str(own[0].message)
        else:
            assert status["cpu"] == "available", (operation, status)
        if triton == "no-triton":
            assert status["triton"] == "triton is not installed", status
    refusal = ""
    try:
        clk.average_([torch.zeros(1)], [torch.ones(1)], 0.5, backend="triton")
    except ValueError as error:
        refusal = str(error)
    assert "triton" in refusal, "backend='triton' ran on the CPU outside the interpreter"
    done = subprocess.run([sys.executable, "-m", "cl_kernels.doctor"], capture_output=True, text=True, check=True)
    for word in ("Versions", "Devices", "Compiled library", "Operations", "average_"):
        assert word in done.stdout, done.stdout
    print(done.stdout)


def check_operations(torch, clk) -> None:
    """Each operation against a formula of its own, forward and backward."""
    torch.manual_seed(0)
    average, value = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0], dtype=torch.bfloat16)
    clk.average_([average], [value], 0.25)
    assert average.tolist() == [1.5, 3.0]

    x, w_gate = torch.randn(5, 3), torch.randn(3, 4, requires_grad=True)
    gates, ids, usage = clk.top_k_gating(x, w_gate, k=2)
    kept, expected = torch.topk(x @ w_gate, 2)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(gates, kept.softmax(1))
    assert usage.sum() == 10
    gates[:, 0].sum().backward()
    assert w_gate.grad.abs().sum() > 0

    down, up = torch.randn(4, 6, 3), torch.randn(4, 3, 6, requires_grad=True)
    tokens = torch.randn(5, 7, 3)
    out = clk.moe_adapter(tokens, ids, gates.detach(), down, torch.zeros(4, 6), up, torch.zeros(4, 3), residual=tokens)
    by_hand = tokens + sum(
        gates.detach()[:, j, None, None] * (tokens @ down[ids[:, j]].mT).relu() @ up[ids[:, j]].mT for j in range(2)
    )
    torch.testing.assert_close(out, by_hand, atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert up.grad.abs().sum() > 0

    student, teacher, anchors = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3), torch.randn(9, 3)
    loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=4.0)
    a, b = 4 * student @ anchors.T / 2, 4 * teacher @ anchors.T / 2
    rows = -4 * (b.softmax(1) * a.log_softmax(1)).sum(1).mean()
    columns = -4 * (b.softmax(0) * a.log_softmax(0)).sum(0).mean()
    torch.testing.assert_close(loss, rows + columns)
    torch.testing.assert_close(clk.distill_kl(2 * a, 2 * b), rows)
    loss.backward()
    assert student.grad.abs().sum() > 0


if __name__ == "__main__":
    main(*sys.argv[1:])
