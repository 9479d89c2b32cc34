#!/bin/sh
# The first process of the test guest. It prints what it sees on the console and obeys lines that it reads there;
# no agent runs in it. Kernel command line:
#   guest.run=NAME       what to run: web, client, tiny, bench, shell, poweroff (etc/guest/NAME.sh)
#   guest.ip4=ADDR/LEN   a fixed address in place of DHCP          guest.gw4=ADDR
#   guest.ip6=ADDR/LEN   a fixed address in place of autoconfiguration
#   guest.peer4=ADDR guest.peer6=ADDR   whom the client talks to
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo 1 > /proc/sys/kernel/printk
# Lets guest-tool open ICMP echo sockets.
echo "0 0" > /proc/sys/net/ipv4/ping_group_range
stty -echo < /dev/console

BOOT_ID=$(cat /proc/sys/kernel/random/boot_id)
for word in $(cat /proc/cmdline); do
    case $word in
        guest.run=*) RUN=${word#*=} ;;
        guest.ip4=*) IP4=${word#*=} ;;
        guest.gw4=*) GW4=${word#*=} ;;
        guest.ip6=*) IP6=${word#*=} ;;
        guest.peer4=*) PEER4=${word#*=} ;;
        guest.peer6=*) PEER6=${word#*=} ;;
    esac
done
export BOOT_ID RUN IP4 GW4 IP6 PEER4 PEER6

ready() {
    read -r up _ < /proc/uptime
    echo "GUEST-READY boot_id=$BOOT_ID uptime=$up"
}

load() {
    while read -r module; do
        insmod "$module" || echo "MODULE-FAILED $module"
    done < "$1"
}

net_up() {
    ip link set lo up
    [ -e /sys/class/net/eth0 ] || return 0
    conf=/proc/sys/net/ipv6/conf/eth0
    # No wait for duplicates and no delay before asking for a router: each would cost a second.
    echo 0 > $conf/accept_dad
    echo 0 > $conf/dad_transmits
    echo 0 > $conf/router_solicitation_delay
    [ -z "$IP6" ] || ip -6 addr add "$IP6" dev eth0
    if [ -n "$IP4" ]; then
        ip addr add "$IP4" dev eth0
        ip link set eth0 up
        [ -z "$GW4" ] || ip route add default via "$GW4"
        echo "NET4 addr=$IP4 gw=$GW4"
    else
        ip link set eth0 up
        # Answers within three seconds come before GUEST-READY; later ones are still taken, in the background.
        udhcpc -i eth0 -s /etc/udhcpc.sh -O mtu -t 3 -T 1 -A 2 -b > /dev/null 2>&1
    fi
}

# The smallest guest is ready before it has any device.
case $RUN in tiny | bench) ready ;; esac
load /etc/modules
net_up
case $RUN in tiny | bench) ;; *) ready ;; esac
load /etc/modules.late
guest-tool console < /dev/console &
[ -r "/etc/guest/$RUN.sh" ] && . "/etc/guest/$RUN.sh"
# Reaps what is left to it, for ever.
while :; do sleep 3600 & wait $!; done
