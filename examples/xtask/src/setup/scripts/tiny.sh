# What a guest is for, in the smallest way: a block written to its disk and read back from there, and an address of its network.
disk=none
if [ -b /dev/vda ]; then
    disk=FAILED
    echo "used by $BOOT_ID" | dd of=/dev/vda bs=512 seek=8 conv=sync,fsync 2> /dev/null
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vda bs=512 skip=8 count=1 2> /dev/null | grep -q "used by $BOOT_ID" && disk=ok
fi
ip4=$(ip -4 addr show eth0 2> /dev/null | grep -o 'inet [0-9.]*' | cut -d' ' -f2)
echo "TINY-USED disk=$disk ip4=${ip4:-none}"
