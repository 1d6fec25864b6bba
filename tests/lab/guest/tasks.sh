# Guest side of the lab's scenarios; sourced by /init of the L2 initramfs. The
# Debian guest does not have it: a scenario types into its console instead.
#
# The kernel command line steers it: lab.do=TASK,TASK,... names the tasks, in
# order; lab.KEY=VALUE are their arguments; lab.end= says how to end. Every
# report is one console line: "L2 task=NAME key=value ... result=ok|fail".

# say WORDS...: one report line. The leading newline ends whatever the kernel
# or a prompt left on the line, so that "L2" stands at its start.
say() { printf '\nL2 %s\n' "$*"; }

# arg KEY DEFAULT: the value of lab.KEY= on the kernel command line.
arg() {
    for word in $(cat /proc/cmdline); do
        case $word in "lab.$1="*) printf '%s' "${word#*=}"; return ;; esac
    done
    printf '%s' "$2"
}

uptime_s() { cut -d' ' -f1 /proc/uptime; }
sum_of() { sha256sum "$@" | cut -d' ' -f1; }
mem_kib() { awk -v key="$1:" '$1 == key { print $2 }' /proc/meminfo; }

# run_tasks: the boot report, then each task; a failing one is reported and
# the next still runs.
run_tasks() {
    say task=boot kernel="$(uname -r)" cpus="$(grep -c ^processor /proc/cpuinfo)" \
        mem_kib="$(mem_kib MemTotal)" uptime_s="$(uptime_s)" \
        clocksource="$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" result=ok
    configure_network
    for task in $(arg do '' | tr , ' '); do
        try "$task"
    done
}

# try TASK: runs one task; what it does not report itself is its failure.
try() { "task_$1" || say task="$1" result=fail; }

# card: the first network card that is a device (dummy0 is none).
card() { for c in /sys/class/net/*; do [ -e "$c/device" ] && printf '%s' "${c##*/}" && return; done; }

# configure_network: lab.ip=ADDRESS/LENGTH goes to the first network card.
configure_network() {
    address=$(arg ip '')
    [ -n "$address" ] || return 0
    card=$(card)
    if [ -z "$card" ]; then say task=network reason=no-card result=fail; return; fi
    ip link set lo up
    ip address add "$address" dev "$card" && ip link set "$card" up &&
        say task=network card="$card" mac="$(cat /sys/class/net/$card/address)" \
            mtu="$(cat /sys/class/net/$card/mtu)" result=ok
}

# shell: an interactive shell on the console, for a scenario to type into.
task_shell() {
    say task=shell result=ok
    setsid -c sh -i < /dev/console > /dev/console 2>&1
}

# cpus: makes every CPU work, and checks that each took timer interrupts.
task_cpus() {
    count=$(grep -c ^processor /proc/cpuinfo)
    cpu=0
    while [ $cpu -lt "$count" ]; do
        taskset -c $cpu sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done' &
        cpu=$((cpu + 1))
    done
    wait
    idle=$(awk -v n="$count" '$1 == "LOC:" { for (i = 2; i < n + 2; i++) if ($i == 0) idle++ } END { print idle + 0 }' /proc/interrupts)
    [ "$idle" = 0 ] && say task=cpus count="$count" online="$(cat /sys/devices/system/cpu/online)" result=ok
}

# topology: what the guest makes of CPUID and the MADT.
task_topology() {
    base=/sys/devices/system/cpu
    say task=topology \
        sockets="$(cat $base/cpu*/topology/physical_package_id | sort -u | wc -l)" \
        cores="$(cat $base/cpu*/topology/core_cpus_list | sort -u | wc -l)" \
        threads="$(cat $base/cpu0/topology/thread_siblings_list)" result=ok
}

# normal_free_kib: free memory in the zone that begins at 4 GiB.
normal_free_kib() {
    awk '/zone +Normal/ { in_zone = 1 } in_zone && /pages free/ { sum += $3; in_zone = 0 } END { print sum * 4 }' /proc/zoneinfo
}

# memory: fills lab.mib MiB of memory with copies of one random block, reads all
# of them back, and tells how much of it lay above 4 GiB (Linux takes that first).
task_memory() {
    mib=$(arg mib 64)
    dd if=/dev/urandom of=/tmp/block bs=1M count=32 2> /dev/null
    want=$(sum_of /tmp/block)
    free_before=$(normal_free_kib)
    n=0; bad=0
    while [ $((n * 32)) -lt "$mib" ]; do cp /tmp/block /tmp/copy$n || return 1; n=$((n + 1)); done
    above=$((free_before - $(normal_free_kib)))
    i=0
    # Not cmp: busybox's reads byte by byte.
    while [ $i -lt $n ]; do
        [ "$(sum_of /tmp/copy$i)" = "$want" ] || bad=$((bad + 1))
        i=$((i + 1))
    done
    rm -f /tmp/copy* /tmp/block
    [ $bad = 0 ] && say task=memory mib=$((n * 32)) above_4g_kib=$above result=ok
}

# disk: writes lab.mib MiB of random bytes at the start of lab.disk, reads them
# back past the cache and reports the checksum for the host to compare.
task_disk() {
    disk=$(arg disk /dev/vda); mib=$(arg mib 16)
    dd if=/dev/urandom of=/tmp/pattern bs=1M count="$mib" 2> /dev/null
    want=$(sum_of /tmp/pattern)
    dd if=/tmp/pattern of="$disk" bs=1M conv=fsync 2> /dev/null || return 1
    echo 3 > /proc/sys/vm/drop_caches
    got=$(dd if="$disk" bs=1M count="$mib" 2> /dev/null | sum_of)
    rm -f /tmp/pattern
    [ "$want" = "$got" ] && say task=disk disk="$disk" mib="$mib" sha256="$want" \
        sectors="$(cat /sys/class/block/${disk##*/}/size)" \
        queues="$(ls /sys/class/block/${disk##*/}/mq | wc -l)" result=ok
}

# diskfull: lab.full MiB of random bytes at the start of lab.disk and back, past the cache, 1 MiB a request.
task_diskfull() {
    disk=$(arg disk /dev/vda); mib=$(arg full 256); began=$(uptime_s)
    dd if=/dev/urandom of=/tmp/pattern bs=1M count="$mib" 2> /dev/null || return 1
    want=$(sum_of /tmp/pattern); made=$(uptime_s)
    dd if=/tmp/pattern of="$disk" bs=1M oflag=direct conv=fsync 2> /dev/null || return 1
    rm -f /tmp/pattern; written=$(uptime_s)
    got=$(dd if="$disk" bs=1M count="$mib" iflag=direct 2> /dev/null | sum_of)
    [ "$want" = "$got" ] && say task=diskfull mib="$mib" sha256="$want" \
        began=$began made=$made written=$written read="$(uptime_s)" result=ok
}

# disks: on each NVMe disk, one after the other, lab.mib MiB of random bytes behind those on the disk
# before it (they may all be the same one), written and read back past the cache.
task_disks() {
    mib=$(arg mib 4); n=0; sums=
    for disk in /dev/nvme*n1; do
        [ -b "$disk" ] || return 1
        dd if=/dev/urandom of=/tmp/pattern bs=1M count="$mib" 2> /dev/null
        want=$(sum_of /tmp/pattern)
        dd if=/tmp/pattern of="$disk" bs=1M seek=$((n * mib)) conv=fsync 2> /dev/null || return 1
        echo 3 > /proc/sys/vm/drop_caches
        got=$(dd if="$disk" bs=1M skip=$((n * mib)) count="$mib" 2> /dev/null | sum_of)
        [ "$want" = "$got" ] || return 1
        sums=$sums${sums:+,}$want
        n=$((n + 1))
    done
    rm -f /tmp/pattern
    say task=disks count=$n sha256="$sums" result=ok
}

# arrived, plugged, gone: wait until lab.disk is there, or any PCI function of the class lab.class (NVMe's),
# or neither.
functions() { grep -l "$(arg class 0x010802)" /sys/bus/pci/devices/*/class 2> /dev/null | wc -l; }
task_arrived() {
    disk=$(arg disk /dev/nvme0n1); n=0
    until [ -b "$disk" ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1; done
    say task=arrived functions="$(functions)" result=ok
}
task_plugged() {
    n=0
    until [ "$(functions)" != 0 ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1; done
    say task=plugged functions="$(functions)" result=ok
}
task_gone() {
    disk=$(arg disk /dev/nvme0n1); n=0
    until [ ! -b "$disk" ] && [ "$(functions)" = 0 ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1; done
    say task=gone result=ok
}

# joined, alone: wait until there are two NVMe disks, or one.
nvme_disks() {
    n=0
    until [ "$(ls /dev/nvme*n1 2> /dev/null | wc -l)" = "$1" ]; do
        sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1
    done
}
task_joined() { nvme_disks 2 && say task=joined functions="$(functions)" result=ok; }
task_alone() { nvme_disks 1 && say task=alone functions="$(functions)" result=ok; }

# writes: in the background, writes one of two files of lab.mib random MiB and then the other, again and again, at
# lab.at MiB of lab.disk, past the cache, and reads back each; it ends at the first difference or error.
# rounds: how many there are, once there is another one.
# written: ends it; also the checksum of the last round, and how often the kernel complained.
task_writes() {
    disk=$(arg disk /dev/nvme0n1); mib=$(arg mib 4); at=$(arg at 64)
    for file in a b; do
        head -c $((mib << 20)) /dev/urandom > /tmp/writes.$file || return 1
        sum_of /tmp/writes.$file > /tmp/writes.$file.sum
    done
    rm -f /tmp/writes.stop /tmp/writes.end /tmp/writes.rounds
    (
        while :; do
            for file in a b; do
                want=$(cat /tmp/writes.$file.sum)
                dd if=/tmp/writes.$file of="$disk" bs=256K seek=$((at * 4)) oflag=direct conv=notrunc || break 2
                got=$(dd if="$disk" bs=256K skip=$((at * 4)) count=$((mib * 4)) iflag=direct | sum_of)
                [ "$want" = "$got" ] || break 2
                echo "$want" >> /tmp/writes.rounds
                [ ! -e /tmp/writes.stop ] || break 2
            done
        done
        touch /tmp/writes.end
    ) 2> /tmp/writes.log &
    task_rounds writes
}
task_rounds() {
    rounds() { cat /tmp/writes.rounds 2> /dev/null | wc -l; }
    begin=$(rounds); n=0
    until [ "$(rounds)" -gt "$begin" ]; do
        [ ! -e /tmp/writes.end ] || return 1
        sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1
    done
    say task="${1:-rounds}" rounds="$(rounds)" result=ok
}
task_written() {
    # Ended by a difference or an error, not by this?
    [ ! -e /tmp/writes.end ] || { tail -n 3 /tmp/writes.log; return 1; }
    touch /tmp/writes.stop
    until [ -e /tmp/writes.end ]; do sleep 0.1; done
    say task=written rounds="$(wc -l < /tmp/writes.rounds)" sha256="$(tail -n 1 /tmp/writes.rounds)" \
        complaints="$(dmesg | grep -c -e 'I/O error' -e 'timeout' -e 'controller is down')" result=ok
}

# busy: reads lab.disk in the background, past the cache, until that fails: then it reports as idle.
task_busy() {
    disk=$(arg disk /dev/nvme0n1); n=0
    reads() { awk '{ print $1 }' "/sys/class/block/${disk##*/}/stat"; }
    begin=$(reads)
    (
        while dd if="$disk" of=/dev/null bs=256K 2> /dev/null; do echo 3 > /proc/sys/vm/drop_caches; done
        say task=idle result=ok
    ) &
    until [ "$(reads)" -gt $((begin + 50)) ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1; done
    say task=busy reads=$(($(reads) - begin)) result=ok
}

# eject: turns off the slot of the PCI function of the class lab.class, as a guest's administrator would.
task_eject() {
    function=$(basename "$(dirname "$(grep -l "$(arg class 0x010802)" /sys/bus/pci/devices/*/class)")")
    for slot in /sys/bus/pci/slots/*; do
        [ "$(cat "$slot/address")" = "${function%.*}" ] || continue
        echo 0 > "$slot/power" && say task=eject slot="${slot##*/}" function="$function" result=ok
        return
    done
    return 1
}

# picture: fills the frame buffer with random pixels and reads them back.
task_picture() {
    n=0
    until [ -c /dev/fb0 ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1; done
    # The text console would paint over it.
    for console in /sys/class/vtconsole/*; do
        grep -q 'frame buffer' $console/name && echo 0 > $console/bind
    done
    fb=/sys/class/graphics/fb0
    lines=$(cut -d, -f2 $fb/virtual_size)
    bytes=$(($(cat $fb/stride) * lines))
    head -c $bytes /dev/urandom > /tmp/picture
    cat /tmp/picture > /dev/fb0 || return 1
    want=$(sum_of /tmp/picture)
    got=$(head -c $bytes /dev/fb0 | sum_of)
    [ "$want" = "$got" ] && say task=picture name="$(tr ' ' _ < $fb/name)" bytes=$bytes sha256="$want" \
        stride="$(cat $fb/stride)" bits="$(cat $fb/bits_per_pixel)" \
        driver="$(basename "$(readlink $fb/device/driver)")" result=ok
}

# serial_ports: the WCH CH352 serial card, which must be there, and its ports.
serial_ports() {
    card=$(grep -l 0x3253 /sys/bus/pci/devices/*/device) || return 1
    card=${card%/device}
    ports=$(find "$card/" -type d -name 'ttyS[0-9]*' | sed 's,.*/,,')
    [ -n "$ports" ]
}

# serial: lab.lines lines of 15 random bytes through each port of a WCH CH352 serial card, which sends back what
# it is given: through all ports at once, each line when the one before it is back. The sample that is this
# card takes 16 bytes in its FIFO for none.
task_serial() {
    lines=$(arg lines 200)
    serial_ports || return 1
    line=/sys/kernel/irq/$(cat "$card/irq")
    interrupts() { echo $(($(tr , + < "$line/per_cpu_count"))); }
    before=$(interrupts)
    for port in $ports; do
        head -c $((lines * 7)) /dev/urandom | od -An -v -tx1 -w7 | tr -d ' ' > /tmp/$port
        (
            exec 3<> /dev/$port
            stty raw -echo <&3
            while read -r sent; do
                echo "$sent" >&3
                read -r -t 20 back <&3 || break
                echo "$back"
            done < /tmp/$port > /tmp/$port.back
        ) &
    done
    wait
    bad=0; arrived=0
    for port in $ports; do
        [ "$(sum_of < /tmp/$port)" = "$(sum_of < /tmp/$port.back)" ] || bad=$((bad + 1))
        arrived=$((arrived + $(wc -l < /tmp/$port.back)))
    done
    # What the kernel says of a line that nobody serves, or that is served for ever.
    complaints=$(dmesg | grep -c -e 'nobody cared' -e 'Disabling IRQ' -e 'too much work')
    say task=serial ports="$(echo $ports | tr ' ' ,)" lines="$lines" arrived=$arrived bad=$bad \
        interrupts=$(($(interrupts) - before)) chip="$(cat "$line/chip_name")" trigger="$(cat "$line/type")" \
        driver="$(basename "$(readlink "$card/driver")")" complaints="$complaints" result=ok
}

# stream: in the background, lines of 14 digits through each port of the serial card at once: the line's number and
# one that follows from it. The next is sent when the one before it has come back, and is what was sent. It ends at
# the first line that is not, or that does not come.
# streams: how many have come back through each port, once there are lab.more more.
# streamed: ends it; nothing must be left in the card.
task_stream() {
    serial_ports || return 1
    rm -f /tmp/stream.*
    for port in $ports; do
        (stream_through "$port"; touch /tmp/stream.end.$port) 2> /tmp/stream.log.$port &
    done
    stream_grows stream
}
stream_through() {
    exec 3<> "/dev/$1" 4> "/tmp/stream.back.$1"
    stty raw -echo <&3
    n=0
    # No program is started in here: each line takes about as long as its interrupts.
    until [ -e /tmp/stream.stop ]; do
        sent=$((100000 + n))$(((n * 48271 + 7919) % 90000000 + 10000000))
        echo "$sent" >&3
        back=; read -r -t 20 back <&3
        if [ "$back" != "$sent" ]; then echo "sent:$sent,back:$back" > "/tmp/stream.bad.$1"; return; fi
        n=$((n + 1)); echo "$back" >&4
    done
    back=; read -r -t 1 back <&3
    [ -z "$back" ] || echo "after_the_last:$back" > "/tmp/stream.bad.$1"
}
stream_count() { wc -l < "/tmp/stream.back.$1"; }
# stream_grows TASK: reports as this task when all have gone on.
stream_grows() {
    serial_ports || return 1
    counts=
    for port in $ports; do
        n=0; begin=$(stream_count $port 2> /dev/null || echo 0)
        until [ "$(stream_count $port 2> /dev/null || echo 0)" -ge $((begin + $(arg more 10))) ]; do
            if [ -e /tmp/stream.end.$port ]; then
                say task="$1" port=$port said="$(cat /tmp/stream.bad.$port /tmp/stream.log.$port | tr ' ' _)" result=fail
                return
            fi
            sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || return 1
        done
        counts=$counts${counts:+,}$(stream_count $port)
    done
    say task="$1" lines=$counts result=ok
}
task_streams() { stream_grows streams; }
task_streamed() {
    stream_grows last || return 1
    touch /tmp/stream.stop
    for port in $ports; do until [ -e /tmp/stream.end.$port ]; do sleep 0.1; done; done
    bad=$(cat /tmp/stream.bad.* 2> /dev/null | tr ' \n' '_+')
    # Sent again from here, it is the same.
    wrong=0; counts=
    for port in $ports; do
        counts=$counts${counts:+,}$(stream_count $port)
        awk '$0 != (100000 + NR - 1) "" ((NR - 1) * 48271 + 7919) % 90000000 + 10000000 { exit 1 }' \
            /tmp/stream.back.$port || wrong=$((wrong + 1))
    done
    complaints=$(dmesg | grep -c -e 'nobody cared' -e 'Disabling IRQ' -e 'too much work' -e 'WARNING: CPU' -e 'BUG:' \
        -e 'Oops' -e 'lockup' -e 'LOCKUP' -e 'stalls on CPU' -e 'input overrun' -e 'blocked for more than')
    [ -z "$bad" ] && [ $wrong = 0 ] || { say task=streamed bad="$bad" wrong=$wrong result=fail; return; }
    say task=streamed lines=$counts complaints="$complaints" result=ok
}

# diskread: the checksum of the first lab.mib MiB of lab.disk.
task_diskread() {
    disk=$(arg disk /dev/vda); mib=$(arg mib 16)
    got=$(dd if="$disk" bs=1M count="$mib" 2> /dev/null | sum_of)
    say task=diskread disk="$disk" mib="$mib" sha256="$got" \
        readonly="$(cat /sys/class/block/${disk##*/}/ro)" \
        serial="$(cat /sys/class/block/${disk##*/}/serial)" result=ok
}

# diskfail: a write that must fail (read-only or failing disk), and the guest lives on.
task_diskfail() {
    disk=$(arg disk /dev/vda)
    if dd if=/dev/urandom of="$disk" bs=1M count=1 conv=fsync 2> /dev/null; then return 1; fi
    say task=diskfail disk="$disk" result=ok
}

# fs: mounts the ext4 file system on lab.disk, writes a file and unmounts.
task_fs() {
    mkdir -p /mnt && mount -t ext4 "$(arg disk /dev/vda)" /mnt || return 1
    dd if=/dev/urandom of=/mnt/written bs=1M count=8 2> /dev/null
    want=$(sum_of /mnt/written)
    umount /mnt && say task=fs sha256="$want" result=ok
}

# discard: gives back the first lab.mib MiB of lab.disk.
task_discard() {
    blkdiscard -l $(($(arg mib 16) * 1048576)) "$(arg disk /dev/vda)" && say task=discard result=ok
}

# netserve: takes one stream on TCP port 7001 and reports its checksum.
task_netserve() {
    # "listening" is printed when the socket listens, so that nobody has to guess.
    (until grep -q ":1B59 00000000:0000 0A" /proc/net/tcp; do sleep 0.05; done; say task=netserve state=listening) &
    got=$(socat -u TCP-LISTEN:7001,reuseaddr STDOUT | sum_of)
    say task=netserve sha256="$got" result=ok
}

# netsend: sends lab.mib MiB of random bytes to lab.peer, TCP port 7002.
task_netsend() {
    dd if=/dev/urandom of=/tmp/pattern bs=1M count="$(arg mib 16)" 2> /dev/null
    want=$(sum_of /tmp/pattern)
    socat -u /tmp/pattern "TCP:$(arg peer 10.0.0.1):7002" || return 1
    rm -f /tmp/pattern
    say task=netsend sha256="$want" result=ok
}

# offloads: the features that the card negotiated.
task_offloads() {
    card=$(card)
    feature() { ethtool -k "$card" | awk -v key="$1:" '$1 == key { print $2 }'; }
    say task=offloads tx_csum="$(feature tx-checksumming)" tso="$(feature tcp-segmentation-offload)" \
        gro_hw="$(feature rx-gro-hw)" queues="$(ls -d /sys/class/net/$card/queues/rx-* | wc -l)" result=ok
}

# vsockecho: echoes what a host connects with on vsock port 5001.
task_vsockecho() {
    say task=vsockecho state=listening
    socat VSOCK-LISTEN:5001 SYSTEM:cat && say task=vsockecho result=ok
}

# vsockcall: connects to the host (context id 2), port 5002, and reports the answer.
task_vsockcall() {
    answer=$(echo hello from the guest | socat -t 5 - VSOCK-CONNECT:2:5002)
    [ -n "$answer" ] && say task=vsockcall answer="$(echo "$answer" | tr ' ' _)" result=ok
}

# memtouch: dirties lab.mib MiB and frees them again, for balloon and reporting.
task_memtouch() {
    dd if=/dev/urandom of=/tmp/block bs=1M count=16 2> /dev/null
    n=0
    while [ $((n * 16)) -lt "$(arg mib 256)" ]; do cp /tmp/block /tmp/touch$n || return 1; n=$((n + 1)); done
    say task=memtouch state=full mem_free_kib="$(mem_kib MemFree)"
    sleep "$(arg hold 3)"
    rm -f /tmp/touch* /tmp/block
    say task=memtouch state=freed mem_free_kib="$(mem_kib MemFree)" result=ok
}

# churn: in the background, copies a file in memory again and again and compares.
task_churn() {
    head -c 4194304 /dev/urandom > /tmp/churn || return 1
    (
        while [ ! -e /tmp/churn.stop ]; do
            cp /tmp/churn /tmp/churn.copy && cmp /tmp/churn /tmp/churn.copy || break
            echo >> /tmp/churn.rounds
            sleep 0.05
        done
        touch /tmp/churn.end
    ) > /tmp/churn.log 2>&1 &
    say task=churn sum="$(sum_of /tmp/churn)" result=ok
}

# churned: ends it; every copy must have been like the file.
task_churned() {
    # Ended by a difference, not by this?
    [ ! -e /tmp/churn.end ] || { say task=churned reason="$(tr ' ' _ < /tmp/churn.log)" result=fail; return; }
    touch /tmp/churn.stop
    while [ ! -e /tmp/churn.end ]; do sleep 0.1; done
    [ ! -s /tmp/churn.log ] &&
        say task=churned rounds="$(wc -l < /tmp/churn.rounds)" sum="$(sum_of /tmp/churn)" result=ok
}

# free: what memory looks like now.
task_free() {
    say task=free mem_kib="$(mem_kib MemTotal)" mem_free_kib="$(mem_kib MemFree)" result=ok
}

# ticks: a line about every 200 ms, for ever: what the clocks say.
task_ticks() {
    n=0
    while :; do
        say task=ticks tick=$n uptime_s="$(uptime_s)" time_s="$(date +%s)"
        n=$((n + 1))
        sleep 0.2
    done
}

# virtiofs: mounts lab.tag, reads what the host left and leaves a file.
task_virtiofs() {
    mkdir -p /mnt && mount -t virtiofs "$(arg tag share)" /mnt || return 1
    got=$(sum_of /mnt/from-host)
    cp /mnt/from-host /mnt/from-guest && sync
    umount /mnt && say task=virtiofs sha256="$got" result=ok
}

# rng: the host's entropy source.
task_rng() {
    name=$(cat /sys/class/misc/hw_random/rng_current)
    distinct=$(dd if=/dev/hwrng bs=64 count=4 2> /dev/null | od -An -v -tx1 -w1 | sort -u | wc -l)
    [ "$distinct" -gt 64 ] && say task=rng source="$name" distinct="$distinct" result=ok
}

# console: a line out of the virtio console, and one line in.
task_console() {
    [ -c /dev/hvc0 ] || return 1
    stty -F /dev/hvc0 -echo 2> /dev/null
    echo 'hello from hvc0' > /dev/hvc0
    read -r line < /dev/hvc0
    say task=console line="$(echo "$line" | tr ' ' _)" result=ok
}

# rtc: the CMOS clock as the kernel reads it.
task_rtc() {
    say task=rtc since_epoch="$(cat /sys/class/rtc/rtc0/since_epoch)" result=ok
}

# button: waits for the power button (one 24-byte input event) and reports it;
# the caller's lab.end= then ends the machine.
task_button() {
    for input in /sys/class/input/event*; do
        case $(cat "$input/device/name") in *'Power Button'*) device=/dev/input/${input##*/} ;; esac
    done
    [ -n "$device" ] || return 1
    say task=button state=waiting
    dd if="$device" bs=24 count=1 of=/dev/null 2> /dev/null && say task=button result=ok
}
