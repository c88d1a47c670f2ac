"""The comparison runs, and its contenders compute what they say. How fast anything is, is not tested."""

import pytest
import torch
from orthonormal import FUNCTIONS, GRAM_SCHMIDT, PARAMETRIZATIONS, TRAINED, PolarByEigh, householder, main


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_gradients(name):
    """Of two kinds: Gram-Schmidt as Householder QR computes it, and the polar factor, by singular values."""

    def polar(weight):
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        return u @ v

    torch.manual_seed(0)
    weight = torch.randn(2, 4, 32, requires_grad=True)
    gradient = torch.randn(2, 4, 32)
    wide = weight.detach().double().requires_grad_()
    expected = (householder if name in GRAM_SCHMIDT else polar)(wide)
    rows = FUNCTIONS[name](weight)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), expected, atol=2e-6, rtol=0)
    found = torch.autograd.grad(rows, weight, gradient)[0].double()
    torch.testing.assert_close(found, *torch.autograd.grad(expected, wide, gradient.double()), atol=2e-6, rtol=0)


def test_backward_of_the_polar_factor():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(PolarByEigh.apply, torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True))


@pytest.fixture
def names_of_rows(capsys):
    """Runs the script, and gives the names of the rows of its tables."""

    def run(options):
        threads = torch.get_num_threads()
        try:
            main(options.split())
        finally:
            torch.set_num_threads(threads)
        lines = capsys.readouterr().out.splitlines()
        rows = [line for line in lines if line.startswith("| ") and not line.startswith("|  |")]
        return [row.split(" | ")[0].removeprefix("| ") for row in rows]

    return run


def test_prints_a_table(names_of_rows):
    assert names_of_rows("--tables time --shapes 2x4x16 --rounds 2") == [*FUNCTIONS, *PARAMETRIZATIONS]


@pytest.mark.slow
@pytest.mark.benchmarks
def test_prints_all_tables(names_of_rows):
    names = names_of_rows("--shapes 2x4x16 1x4x1056 --rounds 2 --seeds 0 --learning_rates 1e-3 --steps 2")
    both = [*FUNCTIONS, *PARAMETRIZATIONS]
    assert names == [*both, *both, *both, *FUNCTIONS, *TRAINED, *PARAMETRIZATIONS]
