#!/bin/bash
# Makes a node of EMR on EC2 ready: slidelake's packages in a Python of their own, what tells Spark its GPUs, and a place where
# YARN keeps each container to its own GPUs. Its argument is the folder in S3 that has requirements.txt and discover.sh.
set -euo pipefail
folder=${1:?say where requirements.txt and discover.sh are: s3://BUCKET/slidelake}

aws s3 cp --only-show-errors "$folder/requirements.txt" /tmp/requirements.txt
sudo python3.11 -m venv /opt/slidelake
sudo /opt/slidelake/bin/pip install --quiet --no-cache-dir --require-hashes --requirement /tmp/requirements.txt
aws s3 cp --only-show-errors "$folder/discover.sh" /tmp/discover.sh
sudo install --mode 755 /tmp/discover.sh /opt/slidelake/discover.sh

# YARN knows the first version of cgroups only, which Amazon Linux 2023 does not mount
sudo mkdir -p /yarn-cgroup/devices
mountpoint -q /yarn-cgroup/devices || sudo mount -t cgroup -o devices cgroupv1-devices /yarn-cgroup/devices
sudo chmod -R a+rwx /yarn-cgroup
