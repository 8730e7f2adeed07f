#!/bin/bash
# Adds jars from Maven Central to a Spark: jars.sh SPARK_HOME SUMS GROUP ARTIFACT VERSION
# Ivy, which Spark has, finds what they need and keeps them in ~/.ivy2. What is in Spark already, in whatever version, stays. Jars
# that the file SUMS names have to be those.
set -euo pipefail
jars=$1/jars sums=$2
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

"${JAVA_HOME:+$JAVA_HOME/bin/}java" -cp "$(echo "$jars"/ivy-*.jar)" org.apache.ivy.Main -warn -confs default \
  -dependency "${@:3}" -retrieve "$new/[artifact]-[revision].[ext]" >/dev/null \
  || { echo "$3:$4:$5 cannot be downloaded from Maven Central" >&2; exit 1; }
for jar in "$new"/*.jar; do
  name=$(basename "$jar")
  if sum=$(grep -F "  $name" "$sums"); then
    (cd "$new" && sha256sum --quiet --check <<< "$sum")
  fi
  compgen -G "$jars/${name%%-[0-9]*}-[0-9]*.jar" >/dev/null || cp "$jar" "$jars/"
done
