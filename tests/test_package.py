"What pip installs: the lists of files, and that an installed package stands without its repository."
import os, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_repo import CFG, MODULES, ROOT, imported_packages

SOURCES = "setup.py settings.ini pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE data tita".split()
PIP = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
ALONE = os.environ | PIP | {"PYTHONPATH": ""}


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The wheel and the source distribution, built from what a clone holds."
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
        copy(ROOT/name, folder/name)
    for kind in "wheel", "sdist":
        run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_{kind}('dist')", cwd=folder)
    return dict(wheel=next(folder.glob("dist/*.whl")), sdist=next(folder.glob("dist/*.tar.gz")))


def data_files():
    "What a user of an installed package needs of the repository's `data`."
    files = [p for p in (ROOT/"data/world").rglob("*") if p.is_file()]
    files += [ROOT/"data/providers.toml", ROOT/"data/coco_objects.txt"]
    return {p.relative_to(ROOT/"data").as_posix() for p in files}


def test_wheel_holds_modules_and_data(built):
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    modules = {f"tita/{m.replace('.', '/')}.py" for m in MODULES}
    assert modules | {f"tita/_shipped/{f}" for f in data_files()} <= names
    assert not {n for n in names if n.split("/")[0] not in ("tita", f"tita-{CFG['version']}.dist-info")}


def test_sdist_holds_what_setup_reads(built):
    names = {n.partition("/")[2] for n in tarfile.open(built["sdist"]).getnames()}
    assert {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {f"data/{f}" for f in data_files()} <= names


def test_imports_are_declared():
    "A module imports at its top what everybody gets; in a function, or in the room of an extra, also what that brings."
    of = packages_distributions()
    always = {canonicalize_name(Requirement(r).name) for r in CFG["requirements"].split()}
    extras = [k for k in CFG if k.endswith("_requirements") and not k.startswith("dev")]
    extra = {canonicalize_name(Requirement(r).name) for k in extras for r in CFG[k].split()}
    wrong = []
    for path in sorted((ROOT/"tita").rglob("*.py")):
        for name, at_top in imported_packages(path):
            if name in sys.stdlib_module_names or name == CFG["lib_name"]:
                continue
            brought = {canonicalize_name(d) for d in of.get(name, [name])}
            is_of_extra = f"{path.parent.name}_requirements" in extras or path.name == "lmms_plugin.py"
            if not brought & (always | extra if is_of_extra or not at_top else always):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, f"{wrong}: name what they come from under `requirements` in settings.ini"


USES = """
import tita, tita.core
from pathlib import Path
assert Path(tita.__file__).is_relative_to(Path(__import__("sys").prefix)), tita.__file__
from tita.api.endpoints import load_providers
from tita.decode.decoder import AlignedDecoder
from tita.world.embedded import load_models, make_scenes
assert load_providers()["providers"]
base, reward, processor = load_models()
scene = make_scenes(1, seed=3)[0]
scene.image.save("scene.png")
print(AlignedDecoder(base, processor=processor).generate(scene.image, "Describe the image.")[0].text)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_stands_alone(kind, built, tmp_path):
    "In an environment of its own that sees only the libraries, from an empty folder."
    venv, here = tmp_path/"venv", tmp_path/"empty"
    here.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=here)
    site = next((venv/"lib").glob("python*"))/"site-packages"
    (site/"libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", venv/"bin/python", "install", "--ignore-installed"]
    run(*pip, "--no-deps", "--no-build-isolation", built[kind], cwd=here)
    said = run(venv/"bin/python", "-c", USES, cwd=here).strip()
    assert said.endswith(".")
    asked = run(venv/"bin/tita-ask", "scene.png", "Describe the image.", "--max-new-tokens", "40", cwd=here)
    assert "a " in asked
    run(venv/"bin/tita-bench", "sample", "--out", "asked/questions.jsonl", "--num", "3", cwd=here)
    assert len((here/"asked/questions.jsonl").read_text().splitlines()) == 8
