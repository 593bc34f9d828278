from tests.hardware.recorded import box

__all__ = ["box"]
