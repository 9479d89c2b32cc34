# The loads of `cargo xtask bench vmm`, one after the other. Whoever measures watches this console and ends the machine.
echo "BENCH-IDLE"
sleep 3
guest-tool bench disk /dev/vda read 16 5
guest-tool bench disk /dev/vda write 16 5
if [ -n "$PEER4" ]; then
    guest-tool bench send "$PEER4" 7001 5
    guest-tool bench receive "$PEER4" 7002 5
fi
echo "BENCH-DONE"
