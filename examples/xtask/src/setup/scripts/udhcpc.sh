#!/bin/sh
# Called by udhcpc with the event as $1 and the lease in the environment.
case $1 in
    bound|renew)
        ip addr replace "$ip/$mask" dev "$interface"
        [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
        for gateway in $router; do
            ip route replace default via "$gateway" dev "$interface"
        done
        : > /etc/resolv.conf
        for server in $dns; do
            echo "nameserver $server" >> /etc/resolv.conf
        done
        [ "$1" = renew ] || echo "NET4 addr=$ip/$mask gw=$router mtu=$mtu dns=$dns" > /dev/console
        ;;
    deconfig)
        # Not what a router may have advertised already.
        ip -4 addr flush dev "$interface" scope global 2> /dev/null
        ;;
esac
