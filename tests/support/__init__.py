"""What tests share: small models, programs and traces of them, machines and engines that stand in for real ones."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "bundled"
