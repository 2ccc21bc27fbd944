# One image for the Ray head, the workers and the job: driver and workers share every version.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Triton compiles its launcher with the C compiler of the machine it runs on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 srsweep

WORKDIR /opt/srsweep

# The dependencies change less often than the code: their layer comes first.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir sweeper trainer kernels analysis db \
    && touch sweeper/__init__.py trainer/__init__.py kernels/__init__.py analysis/__init__.py db/__init__.py \
    && pip install -c constraints.txt ".[postgres,dashboard]" \
    && pip uninstall --yes srsweep

COPY sweeper sweeper
COPY trainer trainer
COPY kernels kernels
COPY analysis analysis
COPY db db
RUN pip install --no-deps -c constraints.txt .

COPY grids grids

USER 1000
WORKDIR /home/srsweep
ENTRYPOINT ["srsweep"]
CMD ["--help"]
