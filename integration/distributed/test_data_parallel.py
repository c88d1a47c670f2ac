"""`nn.DataParallel`, which transformers' Trainer takes where a script is run without a launcher on several GPUs.

The replicas are torch's own and run in threads, as there; only the broadcast, which needs GPUs, is made here.
"""

import importlib
from threading import Thread

import torch
from by_hand import adapt_model, labels_of, make_llama, random_ids

replicate = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of that name


class Broadcast(torch.autograd.Function):
    """`n` copies of each tensor, one replica's after the other's; their gradients are added up."""

    @staticmethod
    def forward(ctx, n, *tensors):
        ctx.count = len(tensors)
        return tuple(tensor.clone() for _ in range(n) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        of_each = ([g for g in gradients[i :: ctx.count] if g is not None] for i in range(ctx.count))
        return None, *(sum(copies) if copies else None for copies in of_each)


def broadcast(tensors, devices, detach=False):
    copies = Broadcast.apply(len(devices), *tensors) if tensors else ()
    return [[*copies[i * len(tensors) : (i + 1) * len(tensors)]] for i in range(len(devices))]


def test_replicas_edit_their_own_rows(monkeypatch):
    """Loss of each replica's row and the summed gradients are those of the rows one after the other."""
    model, by_hand = adapt_model(make_llama(), positions="f2+l2")
    model.train()
    ids = random_ids()
    labels = labels_of(ids, [(5, 12)], [(8, 12)])
    rows = [dict(input_ids=ids[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    losses = [model(**row).loss for row in rows]
    sum(losses).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    columns = [{"prefix": [[0, 1]], "suffix": [[3, 4]]}, {"prefix": [[0, 1]], "suffix": [[6, 7]]}]
    logits = [by_hand.logits(c, input_ids=row["input_ids"])[0] for c, row in zip(columns, rows, strict=True)]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *args: device)
    found = [None, None]

    def run(index, replica):
        found[index] = replica(**rows[index])

    threads = [Thread(target=run, args=pair) for pair in enumerate(replicate.replicate(model, [0, 1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, loss, row_logits in zip(found, losses, logits, strict=True):
        torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(output.logits[0], row_logits, atol=1e-5, rtol=1e-5)
    sum(output.loss for output in found).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-5)
