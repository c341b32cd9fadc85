#!/bin/sh
# Runs nvcc and keeps what ptxas says of the kernels beside the object, as OBJECT.ptxas, for tools/cuda_report.py. ptxas
# speaks only while it compiles; so the report needs no compilation of its own.
object=
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" > "$object.ptxas" 2>&1
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
