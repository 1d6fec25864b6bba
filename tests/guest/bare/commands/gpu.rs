//! `gpu`: has every model GPU of the machine compute, and compares with what the CPU computes.

use super::{Context, Failure, Outcome, event};
use crate::clock::{self, Deadline};
use crate::gpu::{Gpu, open_all};
use crate::heap::PageBuffer;
use crate::{cpu, heartbeat, serial};
use alloc::vec::Vec;
use drover_guest::cmdline::{Arguments, BadArgument};
use drover_guest::gpu::{Command, checksum, compute};
use drover_guest::line::Line;
use drover_guest::pattern;

/// Bytes of video memory behind the result that are filled and looked at.
const FILL_BYTES: u64 = 4096;
/// The result is read through the BAR in this many places.
const SAMPLES: u64 = 256;

/// What is computed.
#[derive(Clone, Copy)]
struct Plan {
    words: u64,
    rounds: u32,
    seed: u64,
    wait_ms: u64,
}

impl Plan {
    fn read(arguments: Arguments<'_>, rounds: u64) -> Result<Self, BadArgument> {
        let rounds = arguments.number("rounds", rounds)?;
        Ok(Self {
            words: arguments.number("words", 32 << 10)?.clamp(1, 4 << 20),
            rounds: u32::try_from(rounds).map_err(|_| BadArgument { key: "rounds" })?,
            seed: arguments.number("seed", 1)?,
            wait_ms: arguments.number("wait_ms", 20_000)?,
        })
    }

    fn bytes(&self) -> u64 {
        self.words * 8
    }

    fn compute(&self) -> Command {
        Command::Compute {
            offset: 0,
            len: self.bytes(),
            seed: self.seed,
            rounds: self.rounds,
        }
    }
}

/// A GPU at work on a plan.
struct Bench {
    gpu: Gpu,
    plan: Plan,
    /// Read and written by the GPU.
    input: PageBuffer,
    output: PageBuffer,
    /// What the video memory behind the result is filled with.
    filling: u64,
    started: u64,
    /// Computations done and checked.
    jobs: u64,
}

/// What came of it.
struct Verdict {
    checksum: u64,
    bad: u64,
    us: u64,
}

/// `gpu words= rounds= seed= wait_ms= job=long`: every GPU at the same time, each asleep until its
/// interrupt. With `job=long`, one computation after the other.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    match context.arguments.text("job").unwrap_or("once") {
        "once" => once(context, line),
        "long" => long(context, line),
        _ => Err(BadArgument { key: "job" }.into()),
    }
}

fn open(context: &mut Context<'_>, plan: Plan) -> Result<Vec<Bench>, Failure> {
    let arguments = context.arguments;
    let apic = context.machine.apic(arguments)?;
    let gpus = open_all(context.machine.pci(arguments)?, apic.id())?;
    if gpus.is_empty() {
        return Err(Failure::new("no-device"));
    }
    apic.start_watchdog();
    cpu::enable_interrupts();
    let benches = (0..).zip(gpus);
    benches
        .map(|(number, gpu)| Bench::new(gpu, number, plan))
        .collect()
}

fn once(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let plan = Plan::read(context.arguments, 16)?;
    let mut benches = open(context, plan)?;
    for bench in &mut benches {
        bench.start();
    }
    let mut bad = 0;
    for (number, bench) in (1..).zip(&mut benches) {
        bench.wait()?;
        let verdict = bench.judge()?;
        bad += verdict.bad;
        serial::print(&mut bench.describe(event(context, "device"), &verdict));
        heartbeat::progress(number);
    }
    line.put("gpus", benches.len())
        .put("words", plan.words)
        .put("rounds", plan.rounds)
        .put("bad", bad);
    if bad != 0 {
        return Err(Failure::new("wrong-result"));
    }
    for bench in &benches {
        if !bench.gpu.has_interrupted() {
            let (fences, interrupts) = bench.gpu.fences_and_interrupts();
            let failure = Failure::new("interrupts-differ-from-fences").with("fences", fences);
            return Err(failure.with("interrupts", interrupts));
        }
    }
    Ok(())
}

/// `gpu job=long seconds= progress_ms= poll_ms=`: computations that each go on with the result of the
/// one before, checked one by one, until the time is over (0: never) or a stop byte arrives.
fn long(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let plan = Plan::read(arguments, 2000)?;
    let end = Deadline::after_ms(arguments.number("seconds", 0)?.saturating_mul(1000));
    let mut progress = Deadline::after_ms(arguments.number("progress_ms", 1000)?);
    let mut poll = Deadline::after_ms(arguments.number("poll_ms", 20)?.max(1));
    let mut benches = open(context, plan)?;
    for bench in &mut benches {
        bench.start();
    }
    let mut bad = 0;
    while !end.passed() {
        heartbeat::beat();
        core::hint::spin_loop();
        if progress.passed() {
            progress = progress.restarted();
            for bench in &benches {
                let mut item = event(context, "progress");
                item.put("gpu", bench.gpu.address)
                    .put("jobs", bench.jobs)
                    .put("steps", bench.gpu.steps_done())
                    .put("bad", bad);
                serial::print(&mut item);
            }
        }
        if !poll.passed() {
            continue;
        }
        poll = poll.restarted();
        for bench in &mut benches {
            bench.gpu.check()?;
            if bench.gpu.is_done() {
                bad += bench.judge()?.bad;
                bench.jobs += 1;
                bench.go_on();
            }
        }
        heartbeat::progress(all_jobs(&benches));
        if bad != 0 || matches!(serial::read(), Some(b's' | b'S')) {
            break;
        }
    }
    line.put("gpus", benches.len())
        .put("words", plan.words)
        .put("rounds", plan.rounds)
        .put("jobs", all_jobs(&benches))
        .put("bad", bad);
    match bad {
        0 => Ok(()),
        _ => Err(Failure::new("wrong-result")),
    }
}

fn all_jobs(benches: &[Bench]) -> u64 {
    benches.iter().map(|bench| bench.jobs).sum()
}

impl Bench {
    fn new(gpu: Gpu, number: u64, plan: Plan) -> Result<Self, Failure> {
        let needed = plan.bytes() + FILL_BYTES + 8;
        if gpu.vram_bytes < needed {
            let failure = Failure::new("vram-too-small").with("needed", needed);
            return Err(failure.with("vram_bytes", gpu.vram_bytes));
        }
        let mut input = PageBuffer::new(plan.bytes() as usize)?;
        for (index, slot) in (0..).zip(words_mut(&mut input)) {
            *slot = pattern::key(index, plan.seed, number).to_le_bytes();
        }
        Ok(Self {
            gpu,
            plan,
            input,
            output: PageBuffer::new(plan.bytes() as usize)?,
            filling: pattern::key(u64::MAX, plan.seed, number),
            started: 0,
            jobs: 0,
        })
    }

    /// The first computation: over what guest memory has.
    fn start(&mut self) {
        let (plan, len) = (self.plan, self.plan.bytes());
        // The video memory's end is reached as well.
        self.gpu
            .set_vram_word(self.gpu.vram_bytes - 8, self.filling);
        let fill = Command::Fill {
            offset: len,
            len: FILL_BYTES,
            word: self.filling,
        };
        let copy_in = Command::CopyIn {
            offset: 0,
            len,
            address: address_of(&mut self.input),
        };
        let copy_out = self.copy_out();
        self.started = clock::now();
        self.gpu.submit(&[fill, copy_in, plan.compute(), copy_out]);
    }

    /// The next computation: over the result, which the video memory still has.
    fn go_on(&mut self) {
        core::mem::swap(&mut self.input, &mut self.output);
        let copy_out = self.copy_out();
        self.started = clock::now();
        self.gpu.submit(&[self.plan.compute(), copy_out]);
    }

    fn copy_out(&mut self) -> Command {
        Command::CopyOut {
            offset: 0,
            len: self.plan.bytes(),
            address: address_of(&mut self.output),
        }
    }

    /// Sleeps until the GPU is done: only its interrupts, and the watchdog, end the sleep.
    fn wait(&self) -> Outcome {
        let patience = Deadline::after_ms(self.plan.wait_ms);
        cpu::halt_until(|| {
            heartbeat::beat();
            self.gpu.is_done() || self.gpu.check().is_err() || patience.passed()
        });
        self.gpu.check()?;
        match self.gpu.is_done() {
            true => Ok(()),
            false => Err(Failure::new("gpu-timeout").with("steps", self.gpu.steps_done())),
        }
    }

    /// Compares what the GPU has computed with what the CPU does.
    fn judge(&mut self) -> Result<Verdict, Failure> {
        let us = clock::micros(clock::now() - self.started);
        self.gpu.check()?;
        let plan = self.plan;
        let mut bad = 0_u64;
        let outputs = words_mut(&mut self.output).iter();
        let pairs = words_mut(&mut self.input).iter().zip(outputs.clone());
        for (index, (input, output)) in (0..).zip(pairs) {
            let word = u64::from_le_bytes(*input);
            let expected = compute(word, index, plan.seed, plan.rounds);
            bad += u64::from(expected != u64::from_le_bytes(*output));
            // The heart beats on, however many rounds there are.
            if index % 64 == 0 {
                heartbeat::beat();
            }
        }
        let checksum = checksum(outputs.clone().map(|word| u64::from_le_bytes(*word)));
        // The same through the BAR.
        let stride = (plan.words / SAMPLES).max(1) as usize;
        for (index, output) in (0..).zip(outputs).step_by(stride) {
            let seen = self.gpu.vram_word(index * 8);
            bad += u64::from(seen != u64::from_le_bytes(*output));
        }
        let filled = [
            plan.bytes(),
            plan.bytes() + FILL_BYTES - 8,
            self.gpu.vram_bytes - 8,
        ];
        for offset in filled {
            bad += u64::from(self.gpu.vram_word(offset) != self.filling);
        }
        Ok(Verdict { checksum, bad, us })
    }

    fn describe(&self, mut line: Line, verdict: &Verdict) -> Line {
        self.gpu.has_interrupted();
        let (_, interrupts) = self.gpu.fences_and_interrupts();
        line.put("gpu", self.gpu.address)
            .put("partition", self.gpu.partition)
            .put("partitions", self.gpu.partitions)
            .put("vram_bytes", self.gpu.vram_bytes)
            .put("words", self.plan.words)
            .put("rounds", self.plan.rounds)
            .hex("checksum", verdict.checksum)
            .put("interrupts", interrupts)
            .put("us", verdict.us)
            .put("bad", verdict.bad)
            .put("verdict", if verdict.bad == 0 { "ok" } else { "bad" });
        line
    }
}

fn words_mut(buffer: &mut PageBuffer) -> &mut [[u8; 8]] {
    buffer.as_mut_slice().as_chunks_mut().0
}

fn address_of(buffer: &mut PageBuffer) -> u64 {
    buffer.as_mut_slice().as_mut_ptr() as u64
}
