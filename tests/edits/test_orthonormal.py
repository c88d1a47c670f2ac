import pytest
import torch
from by_hand import gram_schmidt

from peft_reft.edits import orthonormal
from peft_reft.edits.orthonormal import orthonormal_rows


@pytest.fixture
def no_float64(monkeypatch):
    """As on a device that has none."""
    monkeypatch.setattr(orthonormal, "WITH_FLOAT64", set())


@pytest.mark.parametrize("r", [1, 4, 8, 64, 256])
@pytest.mark.parametrize("d", [256, 4096])
def test_rows_are_orthonormal_to_1e_6(r, d):
    torch.manual_seed(0)
    rows = orthonormal_rows(torch.randn(r, d))
    assert rows.dtype == torch.float32
    assert (rows.double() @ rows.double().T - torch.eye(r)).abs().max() < 1e-6


def test_nearly_dependent_rows():
    torch.manual_seed(0)
    weight = torch.randn(1, 64).repeat(4, 1) + 1e-3 * torch.randn(4, 64)
    rows = orthonormal_rows(weight).double()
    assert (rows @ rows.T - torch.eye(4)).abs().max() < 1e-6


def test_is_gram_schmidt():
    torch.manual_seed(0)
    weight = torch.randn(5, 32)
    torch.testing.assert_close(orthonormal_rows(weight).double(), gram_schmidt(weight), atol=1e-6, rtol=0)


def test_orthonormal_rows_stay():
    torch.manual_seed(0)
    rows = torch.nn.init.orthogonal_(torch.empty(8, 64))
    torch.testing.assert_close(orthonormal_rows(rows), rows, atol=1e-6, rtol=0)
    assert torch.equal(orthonormal_rows(rows), orthonormal_rows(rows.clone()))


def test_no_row_flips_as_an_entry_crosses_zero():
    """Householder QR alone chooses its signs by the entries."""
    weight = torch.eye(2, 4) + 0.1
    for entry in (1e-4, -1e-4):
        weight[0, 0] = entry
        assert orthonormal_rows(weight)[0, 1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    rows = orthonormal_rows(torch.randn(8, 64).to(dtype))
    assert rows.dtype == torch.float32
    assert (rows @ rows.T - torch.eye(8)).abs().max() < 1e-6


def test_gradients():
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)  # batched
    assert torch.autograd.gradcheck(orthonormal_rows, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_qr(dtype):
    torch.manual_seed(0)
    weight = torch.randn(2, 8, 64).to(dtype).requires_grad_()
    gradient = torch.randn(2, 8, 64)
    wide = weight.detach().double().requires_grad_()
    q, upper = torch.linalg.qr(wide.mT)
    rows = (q * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
    expected = torch.autograd.grad(rows, wide, gradient.double())[0].to(dtype)
    torch.testing.assert_close(torch.autograd.grad(orthonormal_rows(weight), weight, gradient)[0], expected)


def test_stacked_as_one_by_one():
    torch.manual_seed(0)
    weights = torch.randn(4, 8, 512)
    torch.testing.assert_close(orthonormal_rows(weights), torch.stack(list(map(orthonormal_rows, weights))))


@pytest.mark.parametrize(("r", "d"), [(1, 8), (8, 64), (8, 8), (64, 512), (256, 512)])
def test_without_float64(no_float64, r, d):
    torch.manual_seed(0)
    weight = torch.nn.init.orthogonal_(torch.empty(r, d)) + 0.1 * torch.randn(r, d) / d**0.5
    weight.requires_grad_()
    wide = weight.detach().double().requires_grad_()
    rows, gradient = orthonormal_rows(weight), torch.randn(r, d)
    assert (rows.double() @ rows.double().T - torch.eye(r)).abs().max() < 1e-6
    torch.testing.assert_close(rows.double(), gram_schmidt(weight), atol=2e-6, rtol=0)
    orthonormal.WITH_FLOAT64.add("cpu")
    expected = torch.autograd.grad(orthonormal_rows(wide), wide, gradient.double())[0].float()
    torch.testing.assert_close(torch.autograd.grad(rows, weight, gradient)[0], expected, atol=1e-5, rtol=1e-5)


def dependent(kind, r, d):
    weight = torch.randn(r, d)
    if kind == "a pair":
        weight[1] = weight[0]
    elif kind == "a sum":
        weight[r - 1] = weight[: r - 1].sum(0)
    elif kind == "rank 1":
        weight = weight[:1].repeat(r, 1)
    elif kind == "rank 2":
        weight = torch.randn(r, 2) @ weight[:2]
    elif kind == "a row of zeros":
        weight[r // 2] = 0
    else:
        weight.zero_()
    return weight


@pytest.mark.parametrize("kind", ["a pair", "a sum", "rank 1", "rank 2", "a row of zeros", "zeros"])
@pytest.mark.parametrize(("r", "d"), [(4, 64), (8, 4096), (8, 8), (64, 512), (256, 1024)])
@pytest.mark.parametrize("float64", [True, False])
def test_dependent_rows_are_finite(monkeypatch, kind, r, d, float64):
    """They lengthen no edit, and the rows before them are as if they were not there."""
    if not float64:
        monkeypatch.setattr(orthonormal, "WITH_FLOAT64", set())
    torch.manual_seed(0)
    weight = dependent(kind, r, d).requires_grad_()
    rows = orthonormal_rows(weight)
    (gradient,) = torch.autograd.grad(rows, weight, torch.randn(r, d))
    assert rows.isfinite().all() and gradient.isfinite().all()
    assert torch.linalg.matrix_norm(rows.double(), 2) < 1 + (1e-6 if float64 else 1e-2)
    if kind == "a sum":
        before = orthonormal_rows(weight[: r - 1])
        torch.testing.assert_close(rows[: r - 1], before, atol=1e-6 if float64 else 1e-3, rtol=0)


def test_scale_does_not_matter():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    for scale in (1e-8, 1e8):
        torch.testing.assert_close(orthonormal_rows(scale * weight), orthonormal_rows(weight), atol=1e-6, rtol=0)


def test_float32_products_may_be_less():
    """As with TF32 or under autocast: what is used stays orthonormal."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rows = orthonormal_rows(torch.randn(8, 64))
    assert (rows.double() @ rows.double().T - torch.eye(8)).abs().max() < 1e-6


def test_second_derivatives():
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(orthonormal_rows, weight)


@pytest.mark.parametrize("float64", [True, False])
def test_derivatives_as_transforms_take_them(monkeypatch, float64):
    """They see the operations, also those of two passes: the same derivative as in the backward pass."""
    if not float64:
        monkeypatch.setattr(orthonormal, "WITH_FLOAT64", set())
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    (found,) = torch.func.vjp(orthonormal_rows, weight)[1](gradient)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(orthonormal_rows(weight), weight, gradient)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_meta():
    assert orthonormal_rows(torch.empty(2, 3, 7, device="meta")).shape == (2, 3, 7)


@pytest.mark.slow
def test_compiled_in_one_graph():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 64)
    rows, compiled = orthonormal_rows(weight), torch.compile(orthonormal_rows, fullgraph=True)(weight)
    torch.testing.assert_close(compiled, rows)
    expected = torch.autograd.grad(rows, weight, gradient)
    torch.testing.assert_close(torch.autograd.grad(compiled, weight, gradient), expected)
