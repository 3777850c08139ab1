#!/usr/bin/env python3
"""Compiles every .cu to PTX that any device from compute capability 8.0 on can run, checks it with ptxas for three
generations, and prints what each kernel takes. Fails where registers spill.

    python3 kernels/cuda/build.py [FILE.cu ...]     writes PTX
    python3 kernels/cuda/build.py --check           writes nothing, and fails where the PTX at hand is not what it would write
    python3 kernels/cuda/build.py --packages        prints the packages below, for pip

nvcc is $NVCC, or that of Python's packages PACKAGES below (no toolkit, no driver), or on the PATH. What it writes depends on
its version: `check.sh` beside this file runs it with these packages.

PTX goes to kernels/cuda/ptx/, compressed (zlib), and a table of it to kernels/src/cuda/table.rs. nvcc 13 writes PTX 9.0,
which only drivers from 580 on take; nothing here needs more than 7.8 (drivers from 520 on), so that is what the files say,
and ptxas reads them as that.
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
PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
TABLE = HERE.parent / "src" / "cuda" / "table.rs"


def toolkit():
    """nvcc, and ptxas beside it."""
    found = os.environ.get("NVCC")
    if not found:
        packages = [pathlib.Path(p) / "nvidia" for p in sys.path if p]
        paths = [p for n in packages if n.is_dir() for p in n.glob("cu*/bin/nvcc")]
        found = str(paths[0]) if paths else shutil.which("nvcc")
    if not found:
        sys.exit("no nvcc: set NVCC or install the packages that this file names")
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


def table_of(modules):
    """Rust's list of (module, its kernels)."""
    lines = [
        "//! Written by `kernels/cuda/build.py`: the embedded PTX and its kernels.",
        "",
        "/// PTX of a source file.",
        "pub(super) struct Module {",
        "    /// Path of the file below `kernels/cuda`, without its end, `-` for `/`.",
        "    pub(super) name: &'static str,",
        "    /// Its PTX, compressed.",
        "    pub(super) ptx: &'static [u8],",
        "    /// Its kernels, sorted.",
        "    pub(super) kernels: &'static [&'static str],",
        "}",
        "",
        "/// All of it.",
        "#[rustfmt::skip]",
        "pub(super) const MODULES: &[Module] = &[",
    ]
    for name, kernels in sorted(modules):
        path = f"../../cuda/ptx/{name}.ptx.z"
        names = ", ".join(f'"{kernel}"' for kernel in sorted(kernels))
        lines.append(f'    Module {{ name: "{name}", ptx: include_bytes!("{path}"), kernels: &[{names}] }},')
    return "\n".join([*lines, "];", ""])


def is_stale(path, text):
    """Whether a packed file does not hold this text: other versions of zlib pack the same text otherwise."""
    try:
        return zlib.decompress(path.read_bytes()).decode() != text
    except (OSError, zlib.error):
        return True


def main():
    arguments = sys.argv[1:]
    if arguments == ["--packages"]:
        return print(*PACKAGES)
    check = arguments == ["--check"]
    nvcc, ptxas = toolkit()
    given = [] if check else [pathlib.Path(p).resolve() for p in arguments]
    sources = given or sorted(HERE.rglob("*.cu"))
    out = HERE / "ptx"
    out.mkdir(exist_ok=True)
    wrong, modules, total, packed = [], [], 0, 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, text, errors, takes in pool.map(lambda s: compile_one(s, nvcc, ptxas, folder), sources):
            if text is None:
                print(errors)
                wrong.append(f"{name} does not compile")
                continue
            modules.append((name, list(takes)))
            path = out / f"{name}.ptx.z"
            # What is the same text stays as it is, so that a build without changes changes nothing.
            if is_stale(path, text):
                if check:
                    wrong.append(f"{path.name} is stale; hint: python3 kernels/cuda/build.py")
                else:
                    path.write_bytes(zlib.compress(text.encode(), 9))
            total, packed = total + len(text), packed + (path.stat().st_size if path.exists() else 0)
            for kernel, by in sorted(takes.items()):
                registers = " ".join(f"{a} {by[a][0]:3}" for a in ARCHITECTURES)
                print(f"{name:20} {kernel:28} registers {registers}  static shared {by[ARCHITECTURES[0]][1]}")
                wrong += [f"{kernel} spills {by[a][2]} bytes on {a}" for a in ARCHITECTURES if by[a][2]]
    if not given:
        known = {f"{name}.ptx.z" for name, _ in modules}
        for old in out.glob("*.ptx.z"):
            if old.name not in known:
                if check:
                    wrong.append(f"{old.name} has no source")
                else:
                    old.unlink()
        table = table_of(modules)
        if check:
            if not TABLE.exists() or TABLE.read_text() != table:
                wrong.append(f"{TABLE.name} is stale; hint: python3 kernels/cuda/build.py")
        elif not wrong:
            TABLE.write_text(table)
    kernels = sum(len(k) for _, k in modules)
    print(f"{len(sources)} files, {kernels} kernels, {total} bytes of PTX, {packed} compressed")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
