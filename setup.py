"Packaging. pyproject.toml, as nbdev writes it, leaves every field to this file; it takes them from settings.ini."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])
if not config.read(root/"settings.ini", encoding="utf-8"):
    raise SystemExit(f"{root/'settings.ini'} is missing: setup.py takes everything from it")
cfg = config["DEFAULT"]

licenses = {"apache2": ("Apache-2.0", "LICENSE")}
statuses = [
    "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]
low, high = (int(cfg[k].split(".")[1]) for k in ("min_python", "max_python"))
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
spdx, license_file = licenses[cfg["license"]]


class BuildWithData(build_py):
    "Puts what an installed package needs of `data/` into its folder `_shipped`, where `tita.core.shipped` looks."
    def run(self):
        super().run()
        if self.editable_mode:  # the repository is there, and so is its `data`
            return
        to = Path(self.build_lib)/cfg["lib_path"]/"_shipped"
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(root/"data/world", to/"world")
        for name in ("providers.toml", "coco_objects.txt"):
            shutil.copy2(root/"data"/name, to)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=spdx,
    license_files=[license_file],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{v}" for v in range(low, high + 1)),
    ],
    python_requires=f">=3.{low}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    include_package_data=True,
    zip_safe=False,
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": sorted({r for rs in extras.values() for r in rs})},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "lmms_eval.models": [f"{cfg['lib_path']}={cfg['lib_path']}.eval.lmms_plugin:manifest"],
    },
    cmdclass={"build_py": BuildWithData},
)
