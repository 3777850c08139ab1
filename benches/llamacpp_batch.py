#!/usr/bin/env python3
"""Wall clock of a static batch in llama.cpp: sequences of random tokens are read one after the other in chunks of 256, then
every step generates one token for all of them. Prints one JSON line.

    benches/llamacpp_batch.py MODEL.gguf --batch B --isl P --osl G [--waves N] [--threads T] [--read-one]
    benches/llamacpp_batch.py MODEL.gguf --requantise DIRECTORY       # the same model as Q4_0, Q8_0 and BF16

--read-one reads one sequence and copies its cache to the others; its time counts for each. --waves repeats the batch: requests
that don't fit the cache together. Needs llama-cpp-python (built for this machine) and numpy.
"""
import argparse
import ctypes
import json
import os
import pathlib
import resource
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # long spins of OpenMP collapse beside any other process
import llama_cpp as ll
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--isl", type=int, default=512)
parser.add_argument("--osl", type=int, default=64)
parser.add_argument("--waves", type=int, default=1)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--read-one", action="store_true")
parser.add_argument("--requantise", metavar="DIRECTORY")
args = parser.parse_args()

UBATCH = 256
silence = ll.llama_log_callback(lambda level, text, data: None)
ll.llama_log_set(silence, ctypes.c_void_p(0))
ll.llama_backend_init()

if args.requantise:
    for name, kind in (
        ("q4_0", ll.LLAMA_FTYPE_MOSTLY_Q4_0),
        ("q8_0", ll.LLAMA_FTYPE_MOSTLY_Q8_0),
        ("bf16", ll.LLAMA_FTYPE_MOSTLY_BF16),
    ):
        how = ll.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = kind, True, args.threads
        target = pathlib.Path(args.requantise) / f"{pathlib.Path(args.model).stem}.{name}.gguf"
        if ll.llama_model_quantize(args.model.encode(), str(target).encode(), ctypes.byref(how)):
            raise SystemExit(f"{target}: could not be written")
        print(target)
    raise SystemExit

model = ll.llama_model_load_from_file(args.model.encode(), ll.llama_model_default_params())
vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
how = ll.llama_context_default_params()
length = -(-(args.isl + args.osl) // 256) * 256
how.n_ctx, how.n_seq_max = args.batch * length, args.batch
how.n_batch = how.n_ubatch = max(UBATCH, args.batch)
how.n_threads = how.n_threads_batch = args.threads
context = ll.llama_init_from_model(model, how)
memory = ll.llama_get_memory(context)
rows = max(UBATCH, args.batch)
step = ll.llama_batch_init(rows, 0, 1)
fields = [np.ctypeslib.as_array(getattr(step, f), (rows,)) for f in ("token", "pos", "n_seq_id", "logits")]


def decode(tokens, positions, sequences, wanted):
    step.n_tokens = count = len(tokens)
    for field, values in zip(fields, (tokens, positions, 1, wanted)):
        field[:count] = values
    for row, sequence in enumerate(sequences):
        step.seq_id[row][0] = sequence
    if ll.llama_decode(context, step):
        raise SystemExit("llama_decode failed")


def best(count):
    logits = ctypes.cast(ll.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(logits, (count, vocab)).argmax(1)


def wave(prompts):
    ll.llama_memory_clear(memory, False)
    began, next_tokens = time.perf_counter(), np.zeros(args.batch, np.int32)
    read = range(1) if args.read_one else range(args.batch)
    for sequence in read:
        for at in range(0, args.isl, UBATCH):
            end = min(at + UBATCH, args.isl)
            wanted = np.zeros(end - at, np.int8)
            wanted[-1] = end == args.isl
            decode(prompts[sequence, at:end], np.arange(at, end), [sequence] * (end - at), wanted)
        next_tokens[sequence] = best(1)[0]
    prefill = (time.perf_counter() - began) * args.batch / len(read)
    if args.read_one:
        next_tokens[:] = next_tokens[0]
        for sequence in range(1, args.batch):
            ll.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        # Copies are made when they are first used.
        decode(next_tokens, args.isl, range(args.batch), 1)
        for sequence in range(args.batch):
            ll.llama_memory_seq_rm(memory, sequence, args.isl, -1)
    began = time.perf_counter()
    for at in range(1, args.osl):
        decode(next_tokens, args.isl + at - 1, range(args.batch), 1)
        next_tokens = best(args.batch)
    return prefill, time.perf_counter() - began


random = np.random.default_rng(1).integers(100, vocab, (args.batch, args.isl)).astype(np.int32)
times = [wave(random) for _ in range(args.waves)]
prefill, generation = (sum(t[i] for t in times) for i in range(2))
print(json.dumps({
    "engine": f"llama.cpp ({ll.__version__})",
    "prefill_s": prefill,
    "decode_s": generation,
    "output_tok_s": args.waves * args.batch * args.osl / (prefill + generation),
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
