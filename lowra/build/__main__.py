"""Build a subset without attacking it: `python -m lowra.build subset=vit source=build builder.tasks=[dtd]`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from lowra.errors import LowraError
from lowra.paths import conf_dir, register_resolvers
from lowra.run import check_choices, quiet_libraries
from lowra.source import build_folder, make_builder


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Build what the configuration names and say where it lies."""
    try:
        builder = make_builder(cfg)
        builder.check()
        built = builder.build(build_folder(cfg, builder))
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where this one stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"dataset: {built.dataset}\nbase model: {built.base}\nevaluation inputs: {built.evaluation}")


if __name__ == "__main__":
    register_resolvers()
    quiet_libraries()
    try:
        check_choices(sys.argv[1:])
    except LowraError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
    main()
