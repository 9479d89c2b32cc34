# A page on a volume: made once with a nonce drawn here, served from then on.
web() {
    tries=0
    while [ ! -e /dev/vda ] && [ $tries -lt 100 ]; do tries=$((tries + 1)); sleep 0.1; done
    [ -e /dev/vda ] || { echo "WEB-FAILED no /dev/vda"; return; }
    # The magic number of ext4 stands at byte 1080 of the volume.
    magic=$(dd if=/dev/vda bs=1 skip=1080 count=2 2> /dev/null | hexdump -e '1/2 "%04x"')
    if [ "$magic" != ef53 ]; then
        # By its path: the bare name is busybox's own, which makes ext2 only.
        /bin/mke2fs -q -F -t ext4 /dev/vda || { echo "WEB-FAILED mke2fs"; return; }
        echo "WEB-MKFS ext4"
    fi
    mount -t ext4 /dev/vda /mnt || { echo "WEB-FAILED mount"; return; }
    if [ ! -e /mnt/index.html ]; then
        cat /proc/sys/kernel/random/uuid > /mnt/index.new
        sync
        mv /mnt/index.new /mnt/index.html
        sync
    fi
    # Served read-only: the file system on the volume is then whole at every moment, whenever the machine is killed.
    mount -o remount,ro /mnt || { echo "WEB-FAILED remount"; return; }
    read -r nonce < /mnt/index.html
    httpd -p 8080 -h /mnt
    echo "WEB-NONCE $nonce"
}
web
