# An image with the package, its dependencies and what CI has: made by the script that CI begins with.
#     docker build --tag dsno-cluster .
FROM python:3.11-bookworm
WORKDIR /opt/dsno-cluster
COPY . .
RUN .ci/setup
ENV PATH=/opt/dsno-cluster/.venv/bin:$PATH
