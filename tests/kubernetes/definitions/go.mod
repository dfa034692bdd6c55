// Definitions of objects that the chart makes for others, by version. Nothing here is built: programs.py takes a file.
module gateway-extproc/tests/kubernetes/definitions

go 1.26.7

require github.com/prometheus-operator/prometheus-operator v0.85.0
