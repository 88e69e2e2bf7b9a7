"""A web service around a packed network.

    uvicorn app:app
    curl -F file=@photo.jpg localhost:8000/classify

`pip install fastapi uvicorn python-multipart`; `logshift convert` makes `model.stlq`, with
preprocessing and labels. For several networks, gRPC and metrics see `logshift serve`.
"""

from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image, UnidentifiedImageError

from logshift.runtime import load

session = load("model.stlq", threads=1)
app = FastAPI()


@app.post("/classify")
def classify(file: UploadFile) -> dict[str, float]:
    """Return the score of each class; calls run in threads, as many at once as there are cores."""
    try:
        picture = Image.open(file.file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise HTTPException(400, f"{file.filename} is no picture") from error
    (scores,) = session.run(picture)
    return dict(zip(session.labels, scores.tolist(), strict=True))
