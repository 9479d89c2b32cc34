#!/bin/sh
# The first process of the lab: a machine whose KVM is real. It runs what is in its part of /lab/runs and says on the console
# how each ended; no agent runs in it. /lab/filter and /lab/nonce are the command's.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
echo 1 > /proc/sys/kernel/printk
ip link set lo up
while read -r module; do
    insmod "$module" || echo "MODULE-FAILED $module"
done < /etc/modules
# A disk of its own: files in memory know no O_DIRECT.
mount -t ext4 /dev/vda /state || echo "DISK-FAILED"
export HOME=/state TMPDIR=/state/tmp IAAS_GUEST_DIR=/lab/guest IAAS_RUNTIME_DIR=/run/iaas RUST_BACKTRACE=1
export RUST_LOG=iaas_core::testing=info
# In here a missing KVM is a failure, no reason to skip.
LAB_NONCE=$(cat /lab/nonce)
export LAB_NONCE
mkdir -p "$TMPDIR"
cd /state || exit
echo "LAB-UP $(cut -d' ' -f1 /proc/uptime) $(dmesg | grep -o 'kvm: Nested Virtualization.*' | head -n 1)"
# A benchmark takes the place of the tests.
if [ -e /lab/bench/run ]; then
    echo "LAB-BEGIN bench"
    sh /lab/bench/run < /dev/null
    echo "LAB-END bench $?"
    echo "LAB-DONE $(cut -d' ' -f1 /proc/uptime)"
    sync
    poweroff -f
fi
# Where each thread of ours stands, now and then: the last one before a silence says what hangs.
watch() {
    while sleep 120; do
        for task in /proc/[0-9]*/task/[0-9]*; do
            grep -q . "${task%/task/*}/cmdline" 2> /dev/null && echo "WATCH ${task#/proc/} $(cat "$task/comm" "$task/wchan" 2> /dev/null)"
        done
    done
}
watch &
part=$(grep -o 'lab.part=[0-9]*' /proc/cmdline | cut -d= -f2)
for run in "/lab/runs/$part"/*; do
    name=${run##*/}
    echo "LAB-BEGIN $name"
    # shellcheck disable=SC2046
    sh "$run" $(cat /lab/filter) < /dev/null
    echo "LAB-END $name $?"
done
# The control experiment: without KVM the same tests must fail, and say so.
rmmod kvm_amd
echo "LAB-BEGIN control"
/lab/programs/linux --test-threads=1 --nocapture --exact "$(cat /lab/control)"
echo "LAB-END control $?"
echo "LAB-DONE $(cut -d' ' -f1 /proc/uptime)"
sync
poweroff -f
