#!/usr/bin/env python3
"""Compiles every .cu to PTX that any device from compute capability 8.0 on can run, checks it with ptxas for three
generations, and prints what each kernel takes. Fails where registers spill.

    python3 kernels/cuda/build.py [FILE.cu ...]

nvcc is $NVCC, or on the PATH, or that of these packages (Python's own; no toolkit, no driver):
    pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \\
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85

PTX goes to kernels/cuda/ptx/, compressed (zlib). nvcc 13 writes PTX 9.0, which only drivers from 580 on take; nothing here
needs more than 7.8 (drivers from 520 on), so that is what the files say, and ptxas reads them as that.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zlib

HERE = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
ISA = "7.8"


def toolkit():
    """nvcc, and ptxas beside it."""
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if not found:
        packages = [pathlib.Path(p) / "nvidia" for p in sys.path if p]
        paths = [p for n in packages if n.is_dir() for p in n.glob("cu*/bin/nvcc")]
        if not paths:
            sys.exit("no nvcc: set NVCC or install the packages that this file names")
        found = str(paths[0])
    return found, str(pathlib.Path(found).with_name("ptxas"))


def kernels_of(report):
    """(name, registers, bytes of static shared memory, bytes spilled) of each kernel that ptxas tells of."""
    parts = re.split(r"Compiling entry function '", report)[1:]
    for part in parts:
        name = part.split("'")[0]
        number = lambda pattern: sum(int(n) for n in re.findall(pattern, part))
        yield name, number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes spill")


def compile_one(source, nvcc, ptxas, folder):
    """PTX of a file, and what its kernels take on each architecture."""
    name = str(source.relative_to(HERE).with_suffix("")).replace("/", "-")
    ptx = pathlib.Path(folder) / f"{name}.ptx"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-arch=compute_80", "--ptx"]
    run = subprocess.run([nvcc, *flags, str(source), "-o", str(ptx)], capture_output=True, text=True)
    if run.returncode != 0:
        return name, None, run.stdout + run.stderr, {}
    text = re.sub(r"(?m)^\.version \d+\.\d+", f".version {ISA}", ptx.read_text())
    # Comments name the compiler's build and take room.
    text = re.sub(r"(?m)^\s*//.*\n", "", text)
    ptx.write_text(text)
    takes = {}
    for architecture in ARCHITECTURES:
        command = [ptxas, "-v", "-O3", f"-arch={architecture}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            return name, None, run.stdout + run.stderr, {}
        for kernel, *numbers in kernels_of(run.stdout + run.stderr):
            takes.setdefault(kernel, {})[architecture] = numbers
    return name, text, "", takes


def main():
    nvcc, ptxas = toolkit()
    given = [pathlib.Path(p).resolve() for p in sys.argv[1:]]
    sources = given or sorted(HERE.rglob("*.cu"))
    out = HERE / "ptx"
    out.mkdir(exist_ok=True)
    if not given:
        for old in out.glob("*.ptx.z"):
            old.unlink()
    wrong, total, packed = [], 0, 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, text, errors, takes in pool.map(lambda s: compile_one(s, nvcc, ptxas, folder), sources):
            if text is None:
                print(errors)
                wrong.append(f"{name} does not compile")
                continue
            data = zlib.compress(text.encode(), 9)
            (out / f"{name}.ptx.z").write_bytes(data)
            total, packed = total + len(text), packed + len(data)
            for kernel, by in sorted(takes.items()):
                registers = " ".join(f"{a} {by[a][0]:3}" for a in ARCHITECTURES)
                print(f"{name:20} {kernel:28} registers {registers}  static shared {by[ARCHITECTURES[0]][1]}")
                wrong += [f"{kernel} spills {by[a][2]} bytes on {a}" for a in ARCHITECTURES if by[a][2]]
    print(f"{len(sources)} files, {total} bytes of PTX, {packed} compressed")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
