//! vCPU threads and the orders they take.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::irqchip::IoApic;
use parking_lot::Mutex;

use super::error::KvmError;
use super::kick;
use super::throttle::{Brake, FULL, Throttle, throttled};
use super::vcpu::{Buses, Exit, ExitCounters, Vcpu, VcpuExitError};
use super::writers::{FaultCounter, writers};

/// How long a vCPU may take to leave the guest. It leaves in microseconds, unless a device
/// handler on its thread waits for a disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a vCPU thread reports.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest shut itself down by a triple fault.
    TripleFault {
        /// On which vCPU.
        vcpu: u32,
    },
    /// The vCPU cannot go on.
    Failed {
        /// Which vCPU.
        vcpu: u32,
        /// Why.
        error: VcpuExitError,
    },
}

/// Where vCPU threads report to. Called on vCPU threads; returns at once.
pub trait VcpuEvents: Send + Sync {
    /// Passes an event on. The vCPU waits for orders afterwards.
    fn report(&self, event: VcpuEvent);
}

/// Closed by a device when the guest has asked for something that ends its run (power-off,
/// reset): the vCPU that asked does not execute another instruction.
#[derive(Debug, Default)]
pub struct GuestGate(AtomicBool);

impl GuestGate {
    /// Holds every vCPU at its next exit.
    pub fn close(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Lets vCPUs run again.
    pub fn open(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is_closed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What all vCPU threads of a VM share.
#[derive(Clone)]
pub struct VcpuContext {
    /// The machine's buses.
    pub buses: Buses,
    /// Hears of ends of level-triggered interrupts.
    pub ioapic: Arc<IoApic>,
    /// Hears of ends of vCPUs.
    pub events: Arc<dyn VcpuEvents>,
    /// See [`GuestGate`].
    pub gate: Arc<GuestGate>,
}

type Job = Box<dyn FnOnce(&mut Vcpu) + Send>;

enum Order {
    Run,
    /// Answered once the vCPU is out of the guest.
    Pause(Sender<()>),
    /// Work on the paused vCPU.
    Call(Job),
}

struct Handle {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
    counters: Arc<ExitCounters>,
    faults: Option<FaultCounter>,
    brake: Arc<Brake>,
}

/// All vCPUs of a VM, each on its own thread, paused at first.
///
/// Dropping it ends the threads.
pub struct VcpuSet {
    handles: Vec<Handle>,
    /// Only while some vCPU is slowed down.
    throttle: Mutex<Option<Throttle>>,
    /// Each vCPU's faults when they were last looked at.
    faults: Mutex<Vec<Option<u64>>>,
}

impl VcpuSet {
    /// Starts a thread per vCPU, named `vcpu-N`. `on_start` runs first on each of them, to pin it.
    ///
    /// # Errors
    /// [`KvmError::Thread`] when the host has no thread left.
    pub fn spawn(
        vcpus: Vec<Vcpu>,
        context: &VcpuContext,
        on_start: impl Fn(u32) + Clone + Send + 'static,
    ) -> Result<Self, KvmError> {
        kick::install().map_err(|source| KvmError::Thread { vcpu: 0, source })?;
        let mut set = Self {
            handles: Vec::with_capacity(vcpus.len()),
            throttle: Mutex::default(),
            faults: Mutex::default(),
        };
        // Of one alone there is nothing to find out.
        let has_others = vcpus.len() > 1;
        for vcpu in vcpus {
            let index = vcpu.index();
            let faults = has_others.then(|| vcpu.fault_counter()).flatten();
            let (orders, inbox) = channel();
            let counters = vcpu.counters();
            let context = context.clone();
            let on_start = on_start.clone();
            let brake = Arc::new(Brake::new());
            let its_brake = Arc::clone(&brake);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .spawn(move || {
                    on_start(index);
                    let mut vcpu = vcpu;
                    vcpu.with_kicks(|vcpu| main_loop(vcpu, &inbox, &its_brake, &context));
                })
                .map_err(|source| KvmError::Thread {
                    vcpu: index,
                    source,
                })?;
            set.handles.push(Handle {
                orders,
                thread,
                counters,
                faults,
                brake,
            });
        }
        Ok(set)
    }

    /// How many vCPUs there are.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a VM has at least one vCPU")]
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        for handle in &self.handles {
            handle.order(Order::Run);
        }
    }

    /// Takes all vCPUs out of the guest: all are signalled, then all are awaited.
    ///
    /// # Errors
    /// [`KvmError::Stuck`] when one does not come.
    pub fn pause(&self) -> Result<(), KvmError> {
        let answers: Vec<_> = self.handles.iter().map(Handle::call_out).collect();
        self.await_all(&answers)
    }

    /// Takes those vCPUs out of the guest that come within `limit`. Those that wait for memory stay
    /// where they are, and stop as soon as it has come. Returns how many have stopped.
    pub fn hold(&self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let answers: Vec<_> = self.handles.iter().map(Handle::call_out).collect();
        let stops = |answer: &&Receiver<()>| {
            let left = deadline.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).is_ok()
        };
        answers.iter().filter(stops).count()
    }

    /// Runs `job` on every paused vCPU, side by side, and returns the results by vCPU.
    ///
    /// # Errors
    /// [`KvmError::Stuck`] when a vCPU is not paused or does not come to it.
    pub fn call<T: Send + 'static>(
        &self,
        job: impl Fn(&mut Vcpu) -> T + Clone + Send + 'static,
    ) -> Result<Vec<T>, KvmError> {
        let answers: Vec<_> = self
            .handles
            .iter()
            .map(|handle| {
                let (answer, answered) = channel();
                let job = job.clone();
                handle.order(Order::Call(Box::new(move |vcpu| {
                    // The caller may have given up waiting.
                    let _ = answer.send(job(vcpu));
                })));
                answered
            })
            .collect();
        self.await_all(&answers)
    }

    /// Lets those vCPUs run `percent` of the time, 1 to 100, that have written to logged memory
    /// since the last call, as far as KVM tells; the others run at full speed, which is 100.
    ///
    /// # Errors
    /// [`KvmError::Throttle`] when the host has no thread left.
    pub fn throttle_writers(&self, percent: u8) -> Result<(), KvmError> {
        let faults = self.new_faults();
        let writers = writers(&faults);
        log::debug!(percent, faults:?, writers:?; "vCPUs that write are slowed down");
        let mut throttle = self.throttle.lock();
        let running = match throttle.take() {
            Some(running) => running,
            None if percent >= FULL => return Ok(()),
            None => {
                let handles = self.handles.iter();
                let vcpus = handles.map(|handle| throttled(&handle.brake, &handle.thread));
                Throttle::start(vcpus.collect()).map_err(KvmError::Throttle)?
            }
        };
        for (vcpu, writes) in writers.into_iter().enumerate() {
            running.set(vcpu, if writes { percent } else { FULL });
        }
        *throttle = (!running.is_idle()).then_some(running);
        Ok(())
    }

    /// Faults that each vCPU has had since the last call.
    fn new_faults(&self) -> Vec<Option<u64>> {
        let counters = self.handles.iter().map(|handle| handle.faults.as_ref());
        let now: Vec<_> = counters.map(|counter| counter?.read().ok()).collect();
        let before = std::mem::replace(&mut *self.faults.lock(), now.clone());
        let before = before.into_iter().chain(std::iter::repeat(Some(0)));
        let pairs = now.into_iter().zip(before);
        pairs
            .map(|(now, before)| Some(now?.wrapping_sub(before?)))
            .collect()
    }

    /// Counts of exits by vCPU.
    pub fn counters(&self) -> impl Iterator<Item = &ExitCounters> {
        self.handles.iter().map(|handle| &*handle.counters)
    }

    fn await_all<T, C: FromIterator<T>>(&self, answers: &[Receiver<T>]) -> Result<C, KvmError> {
        let deadline = Instant::now() + PATIENCE;
        let await_one = |(answer, vcpu): (&Receiver<T>, u32)| {
            let left = deadline.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).map_err(|_| KvmError::Stuck {
                vcpu,
                seconds: PATIENCE.as_secs(),
            })
        };
        answers.iter().zip(0..).map(await_one).collect()
    }
}

impl Handle {
    /// Tells the vCPU to leave the guest; it answers when it has.
    fn call_out(&self) -> Receiver<()> {
        let (answer, answered) = channel();
        self.order(Order::Pause(answer));
        kick::kick(&self.thread);
        answered
    }

    fn order(&self, order: Order) {
        // The receiver lives as long as the thread, which ends only when the sender is dropped.
        let _ = self.orders.send(order);
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        // It signals the threads that are joined below.
        drop(self.throttle.get_mut().take());
        for Handle { orders, thread, .. } in self.handles.drain(..) {
            drop(orders);
            kick::kick(&thread);
            if thread.join().is_err() {
                log::error!("a vCPU thread has panicked");
            }
        }
    }
}

fn main_loop(vcpu: &mut Vcpu, orders: &Receiver<Order>, brake: &Brake, context: &VcpuContext) {
    let mut running = false;
    loop {
        if !running {
            // A closed channel is the order to end.
            let Ok(order) = orders.recv() else { return };
            running = obey(order, vcpu, running);
            // A call out of the guest that came with the next order may have been too early for
            // this thread to notice.
            match obey_waiting(orders, vcpu, running) {
                Some(goes_on) => running = goes_on,
                None => return,
            }
            continue;
        }
        match vcpu.run(&context.buses) {
            // Its access is complete only once it has been entered again (KVM API, "kvm_run"):
            // left like this, the next run would finish it, in whatever state that finds.
            Ok(Exit::Handled) if context.gate.is_closed() => vcpu.leave_at_once(),
            Ok(Exit::Handled) => {}
            Ok(Exit::EndOfInterrupt(vector)) => context.ioapic.end_of_interrupt(vector),
            Ok(Exit::Interrupted) => {
                let goes_on = obey_waiting(orders, vcpu, !context.gate.is_closed())
                    .and_then(|goes_on| rest(brake, orders, vcpu, goes_on));
                match goes_on {
                    Some(goes_on) => running = goes_on,
                    None => return,
                }
            }
            Ok(Exit::TripleFault) => {
                running = false;
                let vcpu = vcpu.index();
                context.events.report(VcpuEvent::TripleFault { vcpu });
            }
            Err(error) => {
                running = false;
                let vcpu = vcpu.index();
                context.events.report(VcpuEvent::Failed { vcpu, error });
            }
        }
    }
}

/// Follows all orders that are there; whether the vCPU runs afterwards, `None` for the order to end.
fn obey_waiting(orders: &Receiver<Order>, vcpu: &mut Vcpu, mut running: bool) -> Option<bool> {
    loop {
        match orders.try_recv() {
            Ok(order) => running = obey(order, vcpu, running),
            Err(TryRecvError::Empty) => return Some(running),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
}

/// Stays out of the guest as long as the throttle wants, unless an order ends that; the same
/// answer as of [`obey_waiting`].
fn rest(
    brake: &Brake,
    orders: &Receiver<Order>,
    vcpu: &mut Vcpu,
    mut running: bool,
) -> Option<bool> {
    while running {
        let Some(left) = brake.rest() else { break };
        match orders.recv_timeout(left) {
            Ok(order) => running = obey(order, vcpu, running),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
    Some(running)
}

/// Follows one order; returns whether the vCPU runs afterwards.
fn obey(order: Order, vcpu: &mut Vcpu, running: bool) -> bool {
    match order {
        Order::Run => true,
        Order::Pause(answer) => {
            // The one who asked may have given up waiting.
            let _ = answer.send(());
            false
        }
        Order::Call(job) => {
            job(vcpu);
            running
        }
    }
}
