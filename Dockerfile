# docker build -t zsq . && docker run --rm -v "$PWD":/work zsq quantize digits --bits W4A4 --budget quick
FROM python:3.12-slim
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[onnx]"
WORKDIR /work
ENTRYPOINT ["zsq"]
