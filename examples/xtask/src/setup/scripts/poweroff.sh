# Off as soon as it is up.
/etc/guest/off
