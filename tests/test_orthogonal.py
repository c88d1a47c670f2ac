import pytest
import torch
from by_hand import gram_schmidt

from peft_reft.orthogonal import orthonormal_rows


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
