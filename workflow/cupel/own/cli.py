"""The command `cupel`, also as `python -m cupel`."""

import argparse
import shlex
import sys

from cupel import __version__
from cupel.cells import MACHINE_ERRORS, MACHINE_WORDS
from cupel.own import LABELS, USUAL

MAIN = """Defences against backdoors in neural networks, for a model of yours.

  cupel purify   run defences on a checkpoint, measure what they do, and write purified checkpoints
  cupel list     the defences, each with a line on what it does

The papers' experiments are another matter: they are run by `snakemake`, see README.md."""

PURIFY = """Run defences on a suspicious image classifier, with clean images that you trust.

  cupel purify model.pth --arch resnet.py:ResNet18 --normalize cifar10 --clean pictures/ --out purified/

First the accuracy on your clean images is printed; where it is near chance nothing is run, and the usual causes are named.
The clean images are divided: defences are tuned on one part, and all is measured on the other. In the folder of --out are
then the purified checkpoints in the form and with the names of yours, a table (results.csv), and a page (index.html)."""

EPILOG = """With the trigger that you suspect, the attack success rate is measured:
  ... --trigger my.py:stamp --target 5      where my.py has: def stamp(images): images[:, -3:, -3:] = 255; return images

A language model is tuned on clean items, and answers your prompts before and after:
  cupel purify --language folder-or-hub-name --clean items.jsonl --probes prompts.txt --out purified/

Limits, and what a defence cannot promise: docs/your-model.md."""


def pairs(text: str) -> tuple[str, str, object]:
    """`fst.alpha=0.001` as defence, name and value."""
    import yaml

    name, equals, value = text.partition("=")
    defence, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form defence.name=value, such as fst.alpha=0.001")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: what stands behind = is no value of YAML") from None
    try:  # YAML reads 1e-3 as text
        return defence, key, float(value) if isinstance(value, str) else value
    except ValueError:
        return defence, key, value


def names(text: str) -> list[str]:
    """Words between commas."""
    return [name for name in text.replace(" ", "").split(",") if name and name != "none"]


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    kind = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("cupel", description=MAIN, formatter_class=kind, usage="cupel [--version] {purify,list} ...")
    top.add_argument("--version", action="version", version=f"cupel {__version__}")
    commands = top.add_subparsers(dest="command", metavar="{purify,list}", help=argparse.SUPPRESS)
    commands.add_parser("list", help="the defences")
    own = commands.add_parser("purify", description=PURIFY, epilog=EPILOG, formatter_class=kind,
                              usage="cupel purify MODEL --arch NAME --clean DATA --out FOLDER [options]")
    own.add_argument("checkpoint", nargs="?", metavar="MODEL", help="safetensors; a file of torch.save with tensors and plain "
                     "values (nothing else is opened); or a TorchScript or torch.export file")

    group = own.add_argument_group("the network")
    group.add_argument("--arch", help="file.py:function, also with arguments as in \"wrn.py:WideResNet(16, width=1)\"; or a "
                       "name of torchvision, timm or a plugin; not needed where MODEL holds the network")
    group.add_argument("--normalize", default="none", metavar="HOW", help="what your code does to pixels in [0, 1] before the "
                       "network: none (default), half, imagenet, cifar10, cifar10-0.2, cifar100, mnist, bytes (pixels in "
                       "0..255), or numbers: mean/std, such as 0.49,0.48,0.45/0.2,0.2,0.2")
    group.add_argument("--head", default="", help="name of the last linear layer, where it is not found by itself")
    group.add_argument("--plugin", action="append", default=[], metavar="FILE",
                       help="file that registers networks, attacks or defences")

    group = own.add_argument_group("clean images")
    group.add_argument("--clean", required=True, metavar="DATA", help="folder with a folder of pictures per class (named by "
                       "its number, else sorted), .npz with images and labels, or a prepared data set (its test images)")
    group.add_argument("--measure", metavar="DATA", help="other images to measure on; all of --clean are then for tuning")
    group.add_argument("--tuning", type=float, default=0.5, metavar="SHARE",
                       help="else: share of --clean that is tuned on (default 0.5)")
    group.add_argument("--spc", type=int, metavar="N", help="tune on at most N images of each class; the measuring part stays")
    group.add_argument("--size", type=int, metavar="PIXELS", help="bring images to this size: shorter side, then the centre")
    group.add_argument("--crop", type=int, metavar="PIXELS",
                       help="padding of random crops while tuning (default: an eighth of the side)")
    group.add_argument("--no-flip", dest="flip", action="store_false", help="do not mirror while tuning: for digits and signs")

    group = own.add_argument_group("the attack, where it is known")
    group.add_argument("--trigger", metavar="WHAT", help="file.py:name of a function from uint8 [N, H, W, C] to the same, or "
                       "of an Attack; or the name of an attack of the library")
    group.add_argument("--target", type=int, metavar="CLASS", help="the label that the attacker wants")

    group = own.add_argument_group("a language model, in place of MODEL")
    group.add_argument("--language", metavar="NAME", help="folder in transformers' form, or a name of the hub; --clean is then "
                       "a file of JSON lines with instruction, input and output, and --defences are finetune and crow")
    group.add_argument("--adapter", metavar="FOLDER", help="the suspicious adapter on it, which is tuned further")
    group.add_argument("--probes", metavar="FILE", help="prompts to answer before and after, one a line")

    group = own.add_argument_group("what is done")
    group.add_argument("--defences", type=names, metavar="NAMES",
                       help="with commas between; default clp,bnp,rnp,fst,ims, cheapest first")
    group.add_argument("--set", type=pairs, action="append", default=[], metavar="D.N=V",
                       help="a hyperparameter other than the paper's: fst.alpha=0.001")
    group.add_argument("--evidence", type=names, metavar="NAMES", help="look for a backdoor without its trigger: "
                       "mm_bd,nc,bti_dbf (default without --trigger), or none")
    group.add_argument("--seed", type=int, default=0, help="of all randomness (default 0)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--out", required=True, metavar="FOLDER", help="where to write; a killed run that is repeated goes on")
    return top


def hyperparameters(given: argparse.Namespace) -> dict[str, dict]:
    """What `--set` says, by defence."""
    settings = {}
    for defence, key, value in given.set:
        settings.setdefault(defence, {})[key] = value
    return settings


def purify_language(given: argparse.Namespace) -> None:
    """Do what the command line says with a language model, and print the answers."""
    from cupel.own import language

    defences = language.USUAL if given.defences is None else given.defences
    rows = language.purify(given.language, given.clean, given.out, probes=given.probes, adapter=given.adapter,
                           defences=defences, settings=hyperparameters(given), seed=given.seed, device=given.device)
    print(f"{language.told(rows)}\nAdapters are in {given.out}/<defence>/model, these answers in {given.out}/answers.md")


def purify(given: argparse.Namespace):
    """Do what the command line says; returns what `cupel.own.run.purify` does."""
    from cupel.own.run import purify as run
    from cupel.own.suspect import opened
    from cupel.registry import load_plugins

    if not given.checkpoint:
        raise ValueError("MODEL is missing: cupel purify --help")
    if given.checkpoint.endswith((".yaml", ".yml")):
        raise ValueError(f"a grid is run by: snakemake --cores all --config {shlex.quote(f'own={given.checkpoint}')} -- own")
    load_plugins(given.plugin)
    network, study, write = opened(vars(given))
    defences = USUAL if given.defences is None else given.defences
    return run(*network, defences=defences, settings=hyperparameters(given), evidence=given.evidence, out=given.out,
               write=write, spc=given.spc, seed=given.seed, device=given.device, **study)


def show(report) -> None:
    """Print the table of a run."""
    from tabulate import tabulate

    rows = []
    for row in report.table.to_dict("records"):
        numbers = {label: f"{100 * row[key]:.1f} ({100 * row[key + '_low']:.1f}–{100 * row[key + '_high']:.1f})"
                   if row[key] == row[key] else "–" for key, label in LABELS.items() if key in report.table}
        rows.append({"defence": row["defence"], **numbers, "result": row["result"]})
    print(tabulate(rows, headers="keys", maxcolwidths=[None] * (len(rows[0]) - 1) + [48]))
    print(f"\nIn percent, with 95 % intervals. Page, table and checkpoints: {report.page}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 where something is wrong with what was given, or where the machine lacks
    something."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "purify" and given.language:
            purify_language(given)
        elif given.command == "purify":
            show(purify(given))
        elif given.command == "list":
            from cupel.images.defences import DEFENCES

            for name, function in sorted(DEFENCES.fill().items()):
                print(f"{name:12} {(function.__doc__ or '').strip().splitlines()[0]}")
        else:
            parser().print_help()
    except Exception as error:
        known = (ValueError, ArithmeticError, ImportError, *MACHINE_ERRORS)
        if not (isinstance(error, known) or MACHINE_WORDS.search(str(error))):
            raise
        print(f"cupel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cupel: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
