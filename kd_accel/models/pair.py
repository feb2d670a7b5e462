"""Student and frozen teachers in one module, which is what the engine prepares."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.timing import span


class Pair(nn.Module):
    """One module, because an engine prepares one.

    So ZeRO-3 partitions frozen teachers as well (half their bytes on two ranks; a second engine for one cannot be
    checkpointed), and one forward call reaches all: under ZeRO-3 parameters are whole only inside that call. Teachers
    stay in eval mode by their own train().
    """

    def __init__(self, student: Student, teachers: dict[str, Teacher]):
        super().__init__()
        self.student = student
        self.teachers = nn.ModuleDict(teachers)

    def forward(
        self, image: Tensor | None, text: dict[str, Tensor], *, teachers: bool = True
    ) -> dict[str, dict[str, Tensor]]:
        """uint8 `image[b,3,H,W]`, tokens `[b,T]` by model -> raw embeddings of each: "student" and the teachers.

        `teachers`: false asks the student alone.
        """
        with span("student"):
            features = {"student": self.student(image, text.get("student"))}
        asked = self.teachers.items() if teachers else []
        with span("teacher"):
            return features | {name: teacher(image, text.get(name)) for name, teacher in asked}
