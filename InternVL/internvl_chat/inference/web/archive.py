"""Export a conversation of the demo as a zip file with training records and images."""

import io
import json
import zipfile
from collections.abc import Sequence

from internvl_chat.data.sources.images import open_upload
from internvl_chat.data.sources.problems import RecordError
from internvl_chat.inference.conversation import training_record
from internvl_chat.inference.web.schema import ExportRequest
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.text import counted

RECORDS = "conversation.jsonl"


def export(request: ExportRequest, model_names: Sequence[str]) -> bytes:
    """Return a zip file with `conversation.jsonl`, one record per model, and the images.

    The image files are named by number, not by their uploaded names.

    Raises:
        DataError: the conversation is not a valid record, or an image is unusable.
    """
    if len(request.answers) != len(model_names):
        raise DataError(
            f"answers of {counted(len(request.answers), 'model')}, but the demo has {len(model_names)}"
        )
    names = [_file_name(data, number) for number, data in enumerate(request.images)]
    records = [
        training_record(messages, names, id=model)
        for messages, model in zip(request.conversations(), model_names, strict=True)
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(RECORDS, lines)
            for name, data in zip(names, request.images, strict=True):
                archive.writestr(name, data)
        return buffer.getvalue()


def _file_name(data: bytes, number: int) -> str:
    """Return the path of an image in the zip file, with the suffix of its format."""
    try:
        with open_upload(data, f"Fig-{number}") as image:
            return f"images/fig-{number}.{str(image.format).lower()}"
    except RecordError as problem:
        raise DataError(str(problem)) from None
