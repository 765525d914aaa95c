# The page of the bundled model: docker build -t dalle1 . && docker run --rm -p 127.0.0.1:7860:7860 dalle1
# The container needs no internet once it is built.
FROM python:3.13-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu ".[web]" -c constraints.txt
ENV HF_HUB_OFFLINE=1
RUN useradd --create-home dalle1
USER dalle1
WORKDIR /home/dalle1
EXPOSE 7860
STOPSIGNAL SIGINT
CMD ["dalle1", "web", "--host", "0.0.0.0", "--port", "7860"]
