#!/bin/sh
# An orderly end: nothing that was written is lost.
echo "GUEST-OFF"
sync
umount /mnt 2> /dev/null || mount -o remount,ro /mnt 2> /dev/null
poweroff -f
