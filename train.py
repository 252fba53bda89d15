"""Train a bit-diffusion segmenter.

    python train.py                                           # tiny, on synthetic shapes: 4 minutes on 2 CPU cores
    python train.py --dataset path/to/folder                  # small, on your images/ and labels/
    python train.py --dataset coco                            # the paper's model, on COCO panoptic

    torchrun --nproc_per_node=8 train.py --preset paper-fast --dataset coco         # the same run, shared by 8 GPUs
    python train.py --export model.pt --out out/coco-paper    # averaged weights and configuration only

Stop with Ctrl-C at any time. To resume, run the same command again. Everything goes to --out: ckpt.pt, the one before it
(ckpt.prev.pt), best.pt (highest validation ARI), log.jsonl and samples_<step>.png (image, truth, samples).
"""

import contextlib
import copy
import dataclasses
import getpass
import math
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data as datasets
import kernels
from bits import Codec, paint
from checkpoint import Beside, Damaged, lock, newest, on_host, read, save
from config import FREE, Config, help_text, parse
from diffusion import Diffusion, draw, fused, fused_training_loss, to_device, training_loss
from engine import (NO_FLOAT64, NoGraph, Step, Watch, anyone, append, fit_state, forget, join, layout,
                    out_of_memory, pick_device,
                    pick_precision, update_ema, written)
from hints import NUMBERS, draw_hints, hint_bits
from model import SIZES, UNet
from validate import save_picture, validate


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate(step, c):
    """Linear warm-up, constant, cosine decay to 0 over the last decay_steps."""
    left = (c.max_steps - step) / max(1, min(c.decay_steps, c.max_steps))
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup_steps)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def batches(data, step, c, codec, diffusion, device, rank, world, fast):
    """What the steps from number `step` on need: files are read ahead in threads; on CUDA, the rest on a stream of its own.

    Yields dictionaries of what `training_loss` takes and `draw` draws, on the device, one row a sample: every world-th
    sample of the global batch. All of it depends on the seed and on the step alone, whoever computes it. fast: what
    `fused` returned, for the kernels' loss. Nothing waits for a CUDA device, up to 1,024 segments an image.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    source = datasets.batches(data, step * c.batch_size, c.batch_size, c.seed, c.workers, rank, world, pin=bool(stream))
    mine, detail = slice(rank, None, world), SIZES[c.network].get("detail", 1)
    photos = c.augment and datasets.names(c.dataset) != ["shapes"]
    codec = copy.copy(codec)
    codec.table = codec.table.to(device)  # once, not at every step
    kind = torch.int8 if codec.classes <= 128 else torch.int16  # of the kernels' cells

    def make(step):
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            images, labels, sizes, u = (v.to(device, non_blocking=True) for v in next(source))
            if photos:
                x, inside, labels = datasets.augment(images, labels, sizes, u, c.image_size, c.crop, c.jitter, detail)
            else:
                labels, sizes = datasets.coarser(labels, sizes, detail)
                x, inside = datasets.normalise(images, sizes, detail)
            labels = labels.masked_fill(~inside, -1)
            generator = torch.Generator().manual_seed(c.seed * 2**32 + step)
            drawn = draw((c.batch_size, codec.channels, *labels.shape[1:]), diffusion, generator, device, eps=not fast)
            if diffusion.hints > 0:
                drawn["u"] = to_device(torch.rand(c.batch_size, NUMBERS, generator=generator), device)
            drawn = {k: v[mine] for k, v in drawn.items()}
            hints = draw_hints(labels, drawn.pop("u"), diffusion.hints) if diffusion.hints > 0 else None
            numbers = range(step * c.batch_size, (step + 1) * c.batch_size)[mine]  # of the run's samples
            if codec.palette == "none":                                            # random codes, from each sample's number
                own = [torch.Generator().manual_seed(c.seed * 2**40 + i) for i in numbers]
                order = torch.cat([torch.rand(1, codec.classes, generator=g).argsort(1) for g in own])
                cells = random_cells(labels, to_device(order, device), data.segments)
            elif fast and hints is None:
                below = data.segments if data.segments <= 1024 else None           # a promise, so that nothing waits
                cells = kernels.locate(labels, codec.side, dtype=kind, labels_below=below)
            else:
                on = "cpu" if device.type in NO_FLOAT64 else device  # exact centroids need it
                cells = codec.cells(labels.to(on), hints=None if hints is None else hints.to(on)).to(device)
            if hints is not None:
                drawn["hints"] = hint_bits(codec.encode(cells), hints)
            if fast:
                seeds = torch.arange(numbers.start, numbers.stop, numbers.step, device=device) + c.seed * 2**40
                batch = dict(cells=cells.to(kind), image=x, seeds=seeds, **drawn)
            else:
                batch = dict(x0=codec.encode(cells), image=x, valid=cells >= 0, **drawn)
            return batch, stream and stream.record_event()

    try:
        coming = make(step)
        while True:
            (batch, ready), step = coming, step + 1
            if stream:
                torch.cuda.current_stream().wait_event(ready)
                for v in batch.values():
                    v.record_stream(torch.cuda.current_stream())                   # not reused before this stream is done
                coming = make(step)                                                # while the network works on this one
            yield batch
            if not stream:                                                         # a CPU's cores are busy with the network
                coming = make(step)
    finally:
        source.close()


def random_cells(labels, order, below):
    """The `none` palette as bits.random_cells has it, without a wait: segments get cells by their size.

    labels (B, H, W) in [-1, below); order (B, classes) int64: what the largest segment of each map gets, the second
    largest, ... -> (B, H, W).
    """
    flat = labels.flatten(1)
    index = torch.where(flat >= 0, flat, below)
    counts = torch.zeros(len(flat), below + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(1, index, torch.ones_like(index))[:, :below]
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 = the largest segment
    rank = torch.where(rank < order.shape[1], rank, 0)  # too many: into the largest
    return paint(order.gather(1, rank), index, labels.shape)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(help_text(__doc__))
        return 0
    try:
        c = parse(argv)
        if c.export:
            return export(c)
        run = prepare(c)
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        return 130
    status = train(c, *run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def portable(content):
    """What sampling needs of a checkpoint: the averaged weights and the configuration."""
    return {k: v for k, v in content.items() if k not in ("net", "optimizer", "scaler")}


def export(c):
    content, path, problem = newest(Path(c.out) / "ckpt.pt")
    if content is None:
        raise ValueError(f"{c.out}/ckpt.pt: no such file: train first, or name the folder of a run with --out")
    if problem:
        print(f"{problem}; using the one before, {path}", file=sys.stderr)
    save(c.export, portable(content))
    print(f"{c.export}: averaged weights and configuration of {path}, step {content['step']}")
    return 0


def build(c, local=None):
    """What the configuration stands for: device, dtype, why, codec, diffusion, the network's arguments, the network."""
    device = pick_device(c.device)
    if device.type == "cuda":
        device = device if local is None else torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))                           # graphs cannot be made on the default one
        torch.backends.cudnn.benchmark = True
    dtype, why = pick_precision(c.precision, device)
    try:
        kernels.use(c.kernels or kernels.mode)
        kernels.live(device)
    except RuntimeError as e:
        raise ValueError(e) from None
    for name in ("compile", "graph"):
        if getattr(c, name) not in ("auto", "on", "off"):
            raise ValueError(f"{name} is auto, on or off, not '{getattr(c, name)}'")
    codec = Codec(c.encoding, c.bits, c.palette, c.seed, c.activation)
    names = [f.name for f in dataclasses.fields(Diffusion) if f.name in Config.__dataclass_fields__]
    diffusion = Diffusion(**{name: getattr(c, name) for name in names})
    if c.loss == "bce" and (codec.encoding, codec.activation) != ("bits", "tanh"):
        raise ValueError(f"--loss bce is of bits that come out of a tanh, not of {codec.encoding} out of {codec.activation}: use --loss mse")
    copies = 1 + (c.hints > 0) + (c.self_condition > 0)                            # of the bits: xt, hints, x_self
    seen = 3 * SIZES[c.network].get("detail", 1) ** 2                              # channels of the image
    network = dict(in_channels=copies * codec.channels + seen, out_channels=codec.channels, dropout=c.dropout, **SIZES[c.network])
    torch.manual_seed(c.seed)
    net = UNet(**network)
    if c.image_size % net.multiple:
        near = max(1, round(c.image_size / net.multiple)) * net.multiple
        raise ValueError(f"--image_size {c.image_size}: network {c.network} needs a multiple of {net.multiple}, e.g. {near}")
    return device, dtype, why, codec, diffusion, network, net.to(device, memory_format=layout(device))


def switches(c, device, dtype, world):
    """Whether to compile, and whether to make a CUDA graph. Raises ValueError for a graph that cannot be."""
    able = device.type == "cuda" and world == 1 and dtype != torch.float16
    if c.graph == "on" and not able:
        raise ValueError("--graph on needs CUDA, a single process and no fp16: use --graph auto")
    return c.compile == "on" or c.compile == "auto" and device.type == "cuda", able and c.graph != "off"


def loss_of(diffusion, codec, dtype, fast):
    """loss(net, batch) of a dictionary that `batches` yields; fast: what `fused` returned, for both."""
    def loss(net, batch):
        if fast:
            return fused_training_loss(net, batch["cells"], batch["image"], codec.channels, batch["seeds"], diffusion, batch,
                                       codec.activate, **fast, dtype=dtype or torch.float32, hints=batch.get("hints"))
        return training_loss(net, batch["x0"], batch["image"], batch["valid"], diffusion, codec.activate, drawn=batch,
                             hints=batch.get("hints"))

    return loss


def differences(old, new, free):
    """["key old -> new", ...] of two dictionaries, but for the keys in free."""
    return [f"{k} {old.get(k, '(none)')} -> {new.get(k, '(none)')}" for k in {**new, **old}
            if k not in free and old.get(k) != new.get(k)]


def extras(d):
    """What a network trained with these options sees beside xt and the image, in the order of its input channels."""
    return [name for name in ("hints", "self_condition") if d.get(name, 0) > 0]


def widened(weights, wide):
    """weights, with zeros for the input channels at the end that only wide has; both are a UNet's state_dict."""
    out = dict(weights)
    for name in {"stem.weight", "finer.bits.weight"} & wide.keys():                # they fold each channel on its own
        out[name] = torch.zeros_like(wide[name])
        out[name][:, : weights[name].shape[1]] = weights[name]
    return out


def prepare(c):
    """All that can be wrong with the user's input goes wrong here. Raises ValueError or OSError."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if c.batch_size % (c.accumulate * world):
        raise ValueError(f"--batch_size {c.batch_size} cannot be split among {world} processes x --accumulate {c.accumulate}")
    device, dtype, why, codec, diffusion, network, net = build(c, local if world > 1 else None)
    switches(c, device, dtype, world)
    origin = "from scratch"
    if c.init:
        source = read(c.init, device)
        if lacks := {"network", "ema"} - source.keys():
            raise ValueError(f"--init {c.init} lacks {', '.join(sorted(lacks))}: it is no checkpoint of train.py")
        old, new = (extras(d) for d in (source.get("diffusion", {}), vars(c)))
        differ = differences(source["network"], network, {"dropout"})
        if new[: len(old)] != old or differences(source["network"], network, {"dropout", "in_channels"}):
            differ = differ or [f"inputs {', '.join(old)} -> {', '.join(new)}"]    # as many channels, of another meaning
            raise ValueError(f"--init {c.init} is another network ({'; '.join(differ)}): choose --network, --bits and "
                             f"--encoding as it has them")
        net.load_state_dict(widened(source["ema"], net.state_dict()))
        added = network["in_channels"] - source["network"]["in_channels"]
        origin = f"from the weights of {c.init}" + f", {added} more input channels at zero" * (added > 0)
    common = dict(root=c.root, cache=c.cache, seed=c.seed, unlabelled=c.unlabelled, components=c.components,
                  max_bad=c.max_bad, void=c.void)
    train_data = datasets.load(c.dataset, "train", datasets.packed_side(c.image_size, c.crop, net.detail), compose=c.compose, **common)
    val_data = datasets.load(c.dataset, "val", c.image_size, **common)
    val_fine = val_data if net.detail == 1 else datasets.load(c.dataset, "val", c.image_size * net.detail, detail=net.detail, **common)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out) if rank == 0 else None                                        # one writer
    resumed, path, problem = newest(out / "ckpt.pt", device)
    if resumed:
        lacks = {"net", "ema", "optimizer", "scaler", "config", "step", "best", "validated"} - resumed.keys()
        if lacks:
            raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it was made by --export or another version; start from "
                             f"its weights with --init, into another --out")
        old = {"void": "", "hints": 0.0, **resumed["config"]}  # versions before had none
        if datasets.same(old["dataset"], c.dataset, resumed.get("contents"), train_data):
            old["dataset"] = c.dataset
        if differ := differences(old, vars(c), FREE) + differences(resumed["network"], network, {"dropout"}):
            raise ValueError(f"{path} was made with other options ({'; '.join(differ)}): use the same, or another --out")
    else:
        ours(out)
    if world > 1:
        join(rank, world, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        step = torch.tensor([resumed["step"] if resumed else 0])
        steps = [torch.zeros_like(step) for _ in range(world)]
        dist.all_gather(steps, step)                                               # all have read: now files may change
        if len({int(v) for v in steps}) > 1:
            raise ValueError(f"{out} holds different checkpoints on different machines: --out must be a shared folder")
    if problem and rank == 0:
        print(f"WARNING: {problem}; going on from the one before, {path}", file=sys.stderr)
        if (out / "ckpt.pt").exists():                                             # it must not become the one before
            os.replace(out / "ckpt.pt", out / "ckpt.damaged")
    return device, dtype, why, codec, diffusion, network, net, resumed, origin, train_data, val_data, val_fine, rank, world, held


def ours(out):
    """Raises ValueError where a run that starts anew would change a file of somebody else's."""
    log, best, start = out / "log.jsonl", out / "best.pt", b'{"step": '
    foreign = log if log.exists() and not start.startswith(log.read_bytes()[: len(start)]) else None      # a kill may cut it
    if best.exists():
        try:
            read(best)
        except Damaged:
            foreign = best
    if foreign:
        raise ValueError(f"{foreign} was not written by train.py: move it, or choose another --out")


def train(c, device, dtype, why, codec, diffusion, network, net, resumed, origin, train_data, val_data, val_fine, rank, world, held):
    out, step, best, validated = Path(c.out), 0, -math.inf, 0
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    kind = dict(fused=device.type in ("cuda", "cpu"), capturable=device.type == "cuda")
    optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, betas=(0.9, 0.999), weight_decay=c.weight_decay, **kind)
    fast, (compiled, graph) = fused(codec, device), switches(c, device, dtype, world)
    update = Step(net, loss_of(diffusion, codec, dtype, fast), optimizer, dtype, c.accumulate, c.grad_clip,
                  compiled, graph, world)
    if resumed:
        step, best, validated = resumed["step"], resumed["best"], resumed["validated"]
        net.load_state_dict(resumed["net"])
        ema.load_state_dict(resumed["ema"])
        optimizer.load_state_dict(resumed["optimizer"])
        optimizer.param_groups[0].update(kind)                                     # the run may have changed devices
        fit_state(optimizer)
        update.scaler.load_state_dict(resumed["scaler"])

    def content():
        return dict(
            step=step, best=best, validated=validated, config=vars(c), dataset=c.dataset, image_size=c.image_size,
            network=network, contents=datasets.contents(train_data),
            codec=dict(encoding=c.encoding, bits=c.bits, palette=c.palette, seed=c.seed, activation=c.activation),
            diffusion=dataclasses.asdict(diffusion),
            sampling=dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance, smooth=c.smooth),
            tidy=dict(least=c.least, merge=c.merge),
            net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=update.scaler.state_dict())

    def put(name, action):                                                         # rank 0 writes; a full disk only warns
        return rank > 0 or written(out / name, lambda: action(out / name))

    def store(name, choose=dict, **more):
        """Write a checkpoint beside the training, which waits for the one before and for a copy to the host."""
        if rank == 0:
            beside.wait()
            held = on_host(choose(content()))
            beside(lambda: put(name, lambda path: save(path, held, **more)))

    def checkpoint():
        store("ckpt.pt", keep_previous=True)

    def saved():
        return rank > 0 or beside.wait()

    def say(text, **line):
        if rank == 0:
            print(text, flush=True)
        if line:
            put("log.jsonl", lambda path: append(path, line))

    say(textwrap.fill("  ".join(f"{k}={v}" for k, v in vars(c).items()), 120, break_on_hyphens=False))
    size = "endless" if len(train_data) >= 2**31 else len(train_data)
    origin = f"going on from step {step}" if resumed else origin
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters on {f'{world} x ' if world > 1 else ''}{device}, "
        f"{str(dtype or torch.float32)[6:]} ({why}); kernels: {' ('.join(kernels.live(device))}); {size} training images; {origin}; into {out}/")
    if step >= c.max_steps and validated == step:
        say(f"{out}/ckpt.pt is complete at step {step}: raise --max_steps to go on, or start anew with another --out")
        return 0
    put("log.jsonl", lambda path: forget(path, lambda line: line["step"] <= (validated if "ari" in line else step)))

    stop, first, started, beside = [], step, time.time(), Beside()  # stop: signals; looked at between steps

    def on_signal(number, frame):
        if step == first:                                                          # still compiling, say: nothing to save
            raise SystemExit(128 + number)
        stop.append(number)
        if world == 1:                                                             # torchrun repeats it
            signal.signal(number, signal.SIG_DFL)                                  # a second one ends it at once

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    coming = batches(train_data, step, c, codec, diffusion, device, rank, world, fast)
    stopped, watch, seen = anyone(stop, world), Watch(), []                        # seen: losses and norms since the last line
    try:
        while not next(stopped):
            if step > validated and (step % c.eval_every == 0 or step == c.max_steps):
                result = validate(ema, val_data, val_fine, codec, diffusion, c, stop, rank, world)
                if not result:                                                     # stopped: it is made up for after a resume
                    continue
                ari, iou, picture = result
                validated = step
                drawn = put(f"samples_{step:06d}.png", lambda path: save_picture(picture, path))
                say(f"step {step:>6}  validation ARI {ari:.3f}  IoU {iou:.3f}" + f"  -> {out}/samples_{step:06d}.png" * drawn,
                    step=step, ari=ari, iou=iou, seconds=time.time() - started)
                if ari > best:
                    best = ari
                    store("best.pt", portable)
            if step >= c.max_steps:
                checkpoint()
                say(f"done: {out}/ckpt.pt; now try: python sample.py --n 8 photo.jpg" if saved() else
                    f"done, but not saved in {out}/ckpt.pt: make room, and run the same command again")
                return 0 if saved() else 1

            batch, full = next(coming), False
            if c.dropout:                                                          # a step's randomness: seed and step alone
                torch.manual_seed(c.seed * 2**32 + (rank + 1) * 2**24 + step)
            try:
                seen.append(update(batch, learning_rate(step, c)))
            except NoGraph as e:
                print(f"train.py: {e}: use --graph off and run the same command again", file=sys.stderr)
                return 2
            except RuntimeError as e:
                full = out_of_memory(e)
                if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    print(f"train.py: torch.compile failed ({str(e).strip().splitlines()[0]}): use --compile off; or, if it worked "
                          f"before, delete its cache, the folder torchinductor_{getpass.getuser()} among the temporary files", file=sys.stderr)
                    return 2
                if not full:
                    raise
            if full:                                                               # here the failed step's memory is free again
                fits, tried = update.fits(batch), len(batch["image"]) // c.accumulate
                remedy = f"add --accumulate {c.batch_size // world // fits}" if fits else "choose a smaller --network"
                print(f"train.py: out of memory on {device} with {tried} images at once; {fits or 'not even one'} would fit: "
                      f"{remedy} and run the same command again", file=sys.stderr)
                return 2
            update_ema(ema, net, step, c.ema)
            step += 1

            if step % c.log_every == 0 or step == c.max_steps:
                values = torch.stack(seen) / world                                 # (steps, 2)
                if world > 1:
                    dist.all_reduce(values)
                report = watch(*values.T.tolist(), first=step - len(seen))         # the only wait for the device
                more = {k: v for k, v in report.items() if k != "loss" and v}
                seen, spent = [], time.time() - started
                rate, mean = (step - first) / spent, math.nan if report["loss"] is None else report["loss"]
                say(f"step {step:>6}/{c.max_steps}  loss {mean:.4f}  lr {learning_rate(step - 1, c):.1e}  "
                    f"{rate * c.batch_size:.0f} images/s  {spent / 60:.1f} min, {(c.max_steps - step) / rate / 60:.1f} left"
                    + "".join(f"  {k}: {v}" for k, v in more.items()),
                    step=step, loss=report["loss"], lr=learning_rate(step - 1, c), images_per_second=rate * c.batch_size,
                    seconds=spent, **more)
                if watch.worst >= 20:
                    say(f"stopped at step {step}: {watch.worst} steps in a row had no finite gradient, and changed nothing. "
                        f"Try a lower --lr, --precision fp32 or more --warmup_steps, into another --out")
                    return 1
            if c.keep_every and step % c.keep_every == 0:                          # before ckpt.pt: a run goes on behind that
                store(f"ckpt_{step:06d}.pt")
            if step % c.save_every == 0:
                checkpoint()
        checkpoint()
        say(f"\nstopped{' and saved' if saved() else ''} at step {step}: run the same command again to go on")
        return 128 + (stop[0] if stop else signal.SIGTERM)
    finally:
        coming.close()
        beside.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
