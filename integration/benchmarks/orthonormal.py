"""How to make the rows of R orthonormal: time, operators, accuracy, robustness, and how well LoReFT trains.

    python integration/benchmarks/orthonormal.py
    python integration/benchmarks/orthonormal.py --tables time --shapes 24x8x512 --rounds 15

One thread, CPU time. Operators are ATen calls without views: each is a kernel or more on a GPU. Householder QR and
Cholesky-QR compute one function (Gram-Schmidt), Newton-Schulz and the eigendecomposition another (the polar factor).
What trains is a Llama of 0.9 M parameters that learns what an adapter drawn at random has the same base answer.
"""

import argparse
import contextlib
import statistics
import tempfile
from unittest import mock

import torch
from measure import Contender, Operators, cpu_model, take_turns, use_clock
from peft import get_peft_model
from quantized_dtype import WORDS, interventions, write_tiny_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, set_seed

from peft_reft import ReftConfig
from peft_reft.edits import intervention
from peft_reft.edits.orthonormal import orthonormal_rows

PROMPT, ANSWER, BATCH = 20, 6, 8
WIDE = 1024  # torch's parametrizations take d x d matrices: wider ones are timed for one unit


def eye_like(matrix):
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def householder(weight):
    q, upper = torch.linalg.qr(weight.mT)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).mT


class OwnBackward(torch.autograd.Function):
    """Q = L^-1 W with lower triangular L, whose diagonal is positive, however it was computed."""

    @staticmethod
    def forward(ctx, weight, decompose):
        rows, inverse = decompose(weight)
        ctx.save_for_backward(rows, inverse)
        return rows

    @staticmethod
    def backward(ctx, gradient):
        rows, inverse = ctx.saved_tensors
        middle = -(gradient @ rows.mT)
        middle = middle.tril() + middle.tril(-1).mT
        return inverse.mT @ (gradient + middle @ rows), None


def householder_and_inverse(weight):
    q, upper = torch.linalg.qr(weight.mT)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    lower = (upper * signs.unsqueeze(-1)).mT
    return (q * signs.unsqueeze(-2)).mT, torch.linalg.solve_triangular(lower, eye_like(lower), upper=False)


def cholesky(passes, factored, applied, shift=0.0):
    """Cholesky-QR: the dtypes in which L is found and in which it is applied, and what is added to the diagonal."""

    def decompose(weight):
        rows, total = weight.to(torch.promote_types(weight.dtype, applied)), None
        for _ in range(passes):
            wide = rows.to(torch.promote_types(rows.dtype, factored))
            gram = wide @ wide.mT
            if shift:
                gram = torch.addcmul(gram, gram, eye_like(gram), value=shift)
            lower = torch.linalg.cholesky_ex(gram).L
            inverse = torch.linalg.solve_triangular(lower, eye_like(lower), upper=False).to(rows.dtype)
            rows = inverse @ rows
            total = inverse if total is None else inverse @ total
        return rows.to(weight.dtype), total.to(weight.dtype)

    return lambda weight: OwnBackward.apply(weight, decompose)


def newton_schulz(weight, iterations=14):
    """14 iterations reach 1e-6 from random normal rows of 64 x 512."""
    rows = weight / torch.linalg.matrix_norm(weight, keepdim=True)
    for _ in range(iterations):
        rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
    return rows


class PolarByEigh(torch.autograd.Function):
    """The backward of torch's eigh divides by differences of eigenvalues: zero where rows are orthonormal."""

    @staticmethod
    def forward(ctx, weight):
        wide = weight.double()
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
        roots = values.clamp_min(0).sqrt().unsqueeze(-1)
        inverse = vectors @ (vectors.mT / roots)
        rows = (inverse @ wide).to(weight.dtype)
        ctx.save_for_backward(rows, *(saved.to(weight.dtype) for saved in (inverse, vectors, roots)))
        return rows

    @staticmethod
    def backward(ctx, gradient):
        rows, inverse, vectors, roots = ctx.saved_tensors
        middle = gradient @ rows.mT
        turned = (vectors.mT @ middle @ vectors) / (roots + roots.mT)
        return inverse @ (gradient - middle @ rows) + vectors @ (turned - turned.mT) @ vectors.mT @ rows


F32, F64 = torch.float32, torch.float64
GRAM_SCHMIDT = {
    "Householder QR": householder,
    "Householder QR, own backward": lambda weight: OwnBackward.apply(weight, householder_and_inverse),
    "Cholesky-QR in float32, twice": cholesky(2, F32, F32),
    "Cholesky-QR in float64": cholesky(1, F64, F64),
    "Cholesky-QR in float64, shifted": cholesky(1, F64, F64, shift=1e-14),
    "Cholesky-QR in float64, shifted, twice": cholesky(2, F64, F64, shift=1e-14),
    "Cholesky-QR, L in float64": cholesky(1, F64, F32),
    "Cholesky-QR, L in float64, twice": cholesky(2, F64, F32),
    "peft_reft": orthonormal_rows,
}
FUNCTIONS = GRAM_SCHMIDT | {"Newton-Schulz": newton_schulz, "polar by eigh": PolarByEigh.apply}
PARAMETRIZATIONS = {"Cayley (torch)": "cayley", "Householder parametrization (torch, pyreft)": "householder"}
WHOLE = ", rows of length 1"  # not INIT_ROW_NORM, as they are drawn
CHOSEN = "Cholesky-QR in float64, shifted"
TRAINED = ["Householder QR", CHOSEN, CHOSEN + WHOLE, "polar by eigh"]


def random_rows(*shape):
    return householder(torch.randn(*shape))


class Parametrized(nn.Module):
    """Rows that torch parametrizes."""

    def __init__(self, rows, orthogonal_map):
        super().__init__()
        self.R = nn.Parameter(rows)
        parametrizations.orthogonal(self, "R", orthogonal_map)


class Step(Contender):
    """Forward and backward of all units, one by one or stacked."""

    def __init__(self, name, rows, stacked):
        super().__init__(name)
        self.stacked, self.share = stacked, 1
        if name in PARAMETRIZATIONS and rows.shape[-1] > WIDE:
            self.share, rows = len(rows), rows[:1]
        parts = [rows] if stacked else rows
        self.gradients = [torch.randn_like(part) for part in parts]
        if name in FUNCTIONS:
            weights = [part.clone().requires_grad_() for part in parts]
            self.steps = [(lambda w=w: FUNCTIONS[name](w), w) for w in weights]
        else:
            modules = [Parametrized(part.clone(), PARAMETRIZATIONS[name]) for part in parts]
            self.steps = [(lambda m=m: m.R, next(m.parameters())) for m in modules]

    def run(self):
        for (rows, weight), gradient in zip(self.steps, self.gradients, strict=True):
            torch.autograd.grad(rows(), weight, gradient)

    def operators(self):
        with Operators() as operators:
            self.run()
        return operators.calls.total() * self.share


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def time_table(shapes, rounds):
    for shape in shapes:
        units, r, d = map(int, shape.split("x"))
        start = random_rows(units, r, d)
        names = [*FUNCTIONS, *PARAMETRIZATIONS]
        steps = [Step(name, start, stacked) for name in names for stacked in (False, True)]
        seconds = [runs["total"] for runs in take_turns(steps, rounds if d <= WIDE else min(rounds, 7))]
        cells = []
        for step, own in zip(steps, seconds, strict=True):
            ratio = statistics.median(one / floor for one, floor in zip(own, seconds[0], strict=True)) * step.share
            cells.append(f"{1e3 * step.share * statistics.median(own):.2f} ms, {ratio:.2f} x")
            cells.append(str(step.operators()))
        print_table(
            f"Forward and backward of {units} units of {r} x {d}, and operators",
            ("", "one by one", "operators", "stacked", "operators"),
            [[name, *cells[4 * i : 4 * i + 4]] for i, name in enumerate(names)],
        )


def near_dependent(r, d, noise):
    weight = torch.randn(r, d)
    weight[3] = weight[2] + noise * torch.randn(d)
    return weight


def inputs(r=8, d=512):
    near = {f"e = {noise:g}": (lambda noise=noise: near_dependent(r, d, noise)) for noise in (1e-2, 1e-3, 1e-4, 1e-6)}
    return {
        "orthonormal": lambda: random_rows(r, d),
        "with noise": lambda: random_rows(r, d) + 0.1 * torch.randn(r, d) / d**0.5,
        "normal": lambda: torch.randn(r, d),
        **near,
        "e = 0": lambda: near_dependent(r, d, 0.0),
        "all rows equal": lambda: torch.randn(1, d).repeat(r, 1),
        "a row of zeros": lambda: torch.randn(r, d) * (torch.arange(r) != 3).unsqueeze(-1),
    }


def accuracy(function, draw, reference=None, draws=10):
    """Largest |R R^T - I|, or largest relative error of the gradient; and whether output and gradient are finite."""
    torch.manual_seed(0)
    errors, finite = [], True
    for _ in range(draws):
        weight = draw().requires_grad_()
        rows, gradient = function(weight), torch.randn_like(weight)
        (found,) = torch.autograd.grad(rows, weight, gradient)
        finite = finite and bool(found.isfinite().all())
        if reference is None:
            wide = rows.detach().double()
            errors.append((wide @ wide.mT - eye_like(wide @ wide.mT)).abs().max().item())
        else:
            wide = weight.detach().double().requires_grad_()
            (exact,) = torch.autograd.grad(reference(wide), wide, gradient.double())
            errors.append(((found - exact).norm() / exact.norm()).item())
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    return f"{worst:.0e}" + ("" if finite else ", gradient not finite")


def accuracy_tables():
    draws = inputs()
    rows = [[name, *(accuracy(function, draw) for draw in draws.values())] for name, function in FUNCTIONS.items()]
    for name, orthogonal_map in PARAMETRIZATIONS.items():
        module = Parametrized(random_rows(8, 512), orthogonal_map)
        own, weight = module.parametrizations.R[0], next(module.parameters()).detach()
        cells = [
            accuracy(own, lambda weight=weight, noise=noise: weight + noise * torch.randn_like(weight) / 512**0.5)
            for noise in (0.0, 0.1)
        ]
        cells.append(accuracy(own, draws["normal"]))
        rows.append([name, *cells, *["-"] * (len(draws) - len(cells))])
    print_table("Largest |R R^T - I| of 8 x 512, of 10 draws", ("", *draws), rows)
    columns = ("with noise", "normal", "e = 0.01", "e = 0.0001")
    shapes = {"8 x 512": inputs(), "64 x 512": inputs(64)}
    rows = []
    for name, function in FUNCTIONS.items():
        reference = householder if name in GRAM_SCHMIDT else PolarByEigh.apply
        rows.append([name, *(accuracy(function, shapes[s][c], reference) for s in shapes for c in columns)])
    titles = [f"{shape}, {column}" for shape in shapes for column in columns]
    print_table("Relative error of the gradient, to float64", ("", *titles), rows)


def adapted(folder, **options):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7", **options))


def train(folder, name, rate, seed, steps, tokens):
    """The losses of each step, the held-out loss, and the largest condition number of a stored R."""
    set_seed(seed)
    model = adapted(folder)
    batch_of = lambda rows: {"input_ids": rows, "labels": rows.index_fill(1, torch.arange(PROMPT), -100)}  # noqa: E731
    held_out, rows = tokens[:64], tokens[64:]
    with contextlib.ExitStack() as stack:
        if name in PARAMETRIZATIONS or name.endswith(WHOLE):
            for unit in interventions(model):
                unit.R.data /= intervention.INIT_ROW_NORM
        if name in PARAMETRIZATIONS:
            with torch.random.fork_rng(devices=[]):  # it draws the rest of a basis; the data stay in the same order
                for unit in interventions(model):
                    parametrizations.orthogonal(unit, "_R", PARAMETRIZATIONS[name])
        function = FUNCTIONS.get(name.removesuffix(WHOLE), lambda rows: rows)
        stack.enter_context(mock.patch.object(intervention, "orthonormal_rows", function))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        factor = lambda step: min((step + 1) / (steps / 10), (steps - step) / (0.9 * steps))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        losses = []
        for _ in range(steps):
            loss = model(**batch_of(rows[torch.randint(len(rows), (BATCH,))])).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        condition = max(torch.linalg.cond(unit.R.detach().double()).item() for unit in interventions(model))
        with torch.no_grad():
            return losses, model.eval()(**batch_of(held_out)).loss.item(), condition


def training_table(rates, seeds, steps):
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(folder)
        torch.manual_seed(1)
        teacher = adapted(folder, init_weights=False).eval()
        prompts = torch.randint(2, WORDS, (8 * steps + 64, PROMPT))
        answers = dict(do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER)
        tokens = torch.cat([teacher.generate(part, **answers) for part in prompts.split(256)])
        for rate in rates:
            table, first = [], []
            for name in [*TRAINED, *PARAMETRIZATIONS]:
                runs = [train(folder, name, rate, seed, steps, tokens) for seed in seeds]
                losses, ends, conditions = zip(*runs, strict=True)
                first = first or runs
                apart = max(abs(end - other[1]) for end, other in zip(ends, first, strict=True))
                early = max(
                    abs(a - b)
                    for own, other in zip(losses, first, strict=True)
                    for a, b in zip(own[:50], other[0][:50], strict=True)
                )
                cells = [name, f"{statistics.mean(statistics.mean(own[-10:]) for own in losses):.4f}"]
                cells += [f"{statistics.mean(ends):.4f}", " ".join(f"{end:.4f}" for end in ends)]
                table.append([*cells, f"{early:.0e}", f"{apart:.0e}", f"{max(conditions):.2f}"])
            names = ("", "last ten", "held out", "by seed", "first 50 steps apart", "held out apart", "condition of R")
            print_table(f"Losses at learning rate {rate:g}, {steps} steps; apart: from the first row", names, table)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ["time", "accuracy", "training"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--shapes", nargs="+", default=["16x8x256", "24x8x512", "24x64x512", "64x8x4096"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[4e-4, 1e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    use_clock("cpu")
    print(f"{cpu_model()}, one thread, torch {torch.__version__}")
    if "time" in args.tables:
        time_table(args.shapes, args.rounds)
    if "accuracy" in args.tables:
        accuracy_tables()
    if "training" in args.tables:
        training_table(args.learning_rates, args.seeds, args.steps)


if __name__ == "__main__":
    main()
