//! From the options to a queue that is bound to the exchange, on a connection that is ready to consume.

use std::iter;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use amqp::{Connection, Durability, Error, ErrorKind, Exchange, Queue, Uri, Value};
use logs_common::ExchangeConfig;
use logs_common::exchange::open_as_found;
use logs_common::hints::hint;
use logs_common::password::Brokers;
use logs_process::Failure;

use crate::cli::{Cli, QueueArgs, QueueType};
use crate::environment::Environment;
use crate::queue::{Bindings, BoundQueue, DurableQueue, Source};
use crate::resume::ResumeFile;
use crate::stream::config::{self, StreamConfig};
use crate::stream::place::Place;
use crate::subscription::{Credit, PREFETCH, Subscription};

/// How to declare a durable queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Declare {
    /// Create the queue if it does not exist.
    Create,
    /// Declare the queue passively, because it should exist.
    Find,
}

/// The queue to consume, and how to declare it.
pub struct SubscriptionConfig {
    brokers: Brokers,
    exchanges: Vec<ExchangeConfig>,
    /// Use exchanges and queues as they are.
    passive: bool,
    bindings: Arc<Bindings>,
    queue: QueueArgs,
    /// The stream, if `--stream` is given; it replaces the queue.
    pub(crate) stream: Option<StreamConfig>,
    credit: Credit,
}

impl SubscriptionConfig {
    /// Takes the options of the command line.
    ///
    /// # Errors
    ///
    /// When a URI or the password file is invalid.
    pub fn new(
        cli: &Cli,
        resume: Option<&ResumeFile>,
        environment: &Environment,
    ) -> Result<SubscriptionConfig, Failure> {
        let count = cli.count.and_then(|count| u16::try_from(count).ok());
        let is_filtered = !cli.filter.select_all() && cli.queue.name.is_none();
        let is_counted = cli.stream.name.is_none() && !is_filtered;
        let brokers = cli.connection.brokers()?;
        let exchanges = cli.exchanges();
        exchanges.iter().for_each(ExchangeConfig::warn_about_comma);
        Ok(SubscriptionConfig {
            exchanges,
            passive: cli.declaration.passive,
            bindings: Arc::new(Bindings::new(cli)?),
            queue: cli.queue.clone(),
            stream: StreamConfig::new(cli, brokers.vhost(), resume, environment)?,
            brokers,
            credit: match count {
                // A stream or a filter may skip any number of messages before the first one to write.
                Some(count) if count <= PREFETCH && is_counted => Credit::Once(count),
                _ => Credit::Renewed,
            },
        })
    }

    /// Connects, declares the exchange and the queue, and binds it.
    ///
    /// # Errors
    ///
    /// When no broker can be reached, or the broker refuses a step.
    pub fn prepare(&self) -> Result<Prepared, Error> {
        match &self.stream {
            None => self.prepare_queue(Declare::Create),
            Some(stream) => self.prepare_stream(stream, None),
        }
    }

    /// As [`prepare`](SubscriptionConfig::prepare), after a lost subscription: a durable queue should still exist,
    /// and reading a stream continues at a `place`.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](SubscriptionConfig::prepare).
    pub fn prepare_again(&self, place: Option<Place>) -> Result<Prepared, Error> {
        if let Some(stream) = &self.stream {
            return self.prepare_stream(stream, place);
        }
        if self.queue.name.is_none() || self.passive {
            return self.prepare();
        }
        match self.prepare_queue(Declare::Find) {
            // The broker has also closed the channel, so all steps are repeated.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut prepared = self.prepare()?;
                if let Source::Durable(queue) = &mut prepared.queue.source {
                    queue.is_new = true;
                }
                Ok(prepared)
            }
            prepared => prepared,
        }
    }

    fn prepare_queue(&self, declare: Declare) -> Result<Prepared, Error> {
        open_as_found(self.declarations(), |exchanges| self.prepare_on(exchanges, declare))
    }

    /// As [`prepare_queue`](SubscriptionConfig::prepare_queue), with these declarations of the exchanges.
    fn prepare_on(&self, exchanges: &[Exchange], declare: Declare) -> Result<Prepared, Error> {
        let mut connection = Connection::open(&self.brokers.uris()?, "receive-logs", hint)?;
        self.declare(&mut connection, exchanges);
        let queue = connection.declare_queue(&self.queue(declare))?;
        self.bindings.bind(&mut connection, &queue.name);
        // Messages beyond --count stay in a durable queue for later receivers.
        connection.set_prefetch(self.credit.prefetch());
        let source = match self.queue.name {
            None => Source::Exclusive,
            Some(_) => Source::Durable(DurableQueue::new(self.queue.kind, &queue)),
        };
        let bindings = Arc::clone(&self.bindings);
        let durability = least_durable(exchanges);
        let queue = BoundQueue { name: queue.name, source, durability, bindings, rebinds: true };
        Ok(Prepared { connection, queue, credit: self.credit })
    }

    /// Connects, declares the exchange and the stream, binds the stream, and finds the place to begin at. The binding
    /// comes first, because the search in a stream can take seconds.
    fn prepare_stream(
        &self,
        stream: &StreamConfig,
        reached: Option<Place>,
    ) -> Result<Prepared, Error> {
        open_as_found(self.declarations(), |exchanges| {
            let find = |uris: &[Uri]| -> Result<_, Error> {
                let (mut connection, is_new) = self.open_stream(uris, stream, exchanges)?;
                connection.set_prefetch(self.credit.prefetch());
                let cursor = stream.find(&mut connection, is_new, reached)?;
                if is_new && reached.is_none() && stream.looks_back() {
                    log::warn!(
                        "stream '{}' did not exist: it is created, and keeps messages from now on",
                        stream.name
                    );
                }
                Ok((connection, cursor))
            };
            let all = self.brokers.uris()?;
            let outcome = match find(&all) {
                // Another node of the cluster may have a replica.
                Err(error) if error.kind() == ErrorKind::NoReplica => {
                    all.iter().find_map(|uri| find(slice::from_ref(uri)).ok()).ok_or(error)
                }
                outcome => outcome,
            };
            let (connection, cursor) = outcome?;
            let queue = BoundQueue {
                name: stream.name.clone(),
                source: Source::Stream(Box::new(cursor)),
                durability: least_durable(exchanges),
                bindings: Arc::clone(&self.bindings),
                rebinds: !self.passive,
            };
            Ok(Prepared { connection, queue, credit: self.credit })
        })
    }

    /// Connects, and declares and binds the exchange and the stream, unless `--passive` is given. Returns whether the
    /// stream is new.
    fn open_stream(
        &self,
        uris: &[Uri],
        stream: &StreamConfig,
        exchanges: &[Exchange],
    ) -> Result<(Connection, bool), Error> {
        let open = || -> Result<Connection, Error> {
            let mut connection = Connection::open(uris, "receive-logs", config::hint)?;
            stream.check_broker(&connection)?;
            self.declare(&mut connection, exchanges);
            Ok(connection)
        };
        let mut connection = open()?;
        let existing = Queue::existing(&stream.name);
        if self.passive {
            connection.declare_queue(&existing)?;
            return Ok((connection, false));
        }
        let is_new = !connection.queue_exists(&stream.name)?;
        match connection.declare_queue(&stream.queue()) {
            // The error has closed the channel.
            Err(error) if error.kind() == ErrorKind::OtherQueue => {
                stream.log_other_limits();
                connection = open()?;
                connection.declare_queue(&existing)?;
                // Without this check, a queue of another type would be bound and collect messages that no receiver
                // reads.
                stream.check_type(&mut connection)?;
            }
            declared => drop(declared?),
        }
        self.bindings.bind(&mut connection, &stream.name);
        connection.flush();
        Ok((connection, is_new))
    }

    fn declarations(&self) -> Vec<Exchange> {
        self.exchanges.iter().map(ExchangeConfig::declaration).collect()
    }

    /// Declares the exchanges of these that the broker does not reserve. After a refusal, a later call fails.
    fn declare(&self, connection: &mut Connection, exchanges: &[Exchange]) {
        for (config, exchange) in iter::zip(&self.exchanges, exchanges) {
            if config.is_declared() {
                connection.declare_exchange(exchange);
            }
        }
    }

    fn queue(&self, declare: Declare) -> Queue {
        let Some(name) = &self.queue.name else {
            return self.with_backlog(Queue::exclusive());
        };
        if self.passive || declare == Declare::Find {
            return Queue::existing(name);
        }
        let queue = self.with_backlog(Queue::durable(name));
        match self.queue.kind {
            QueueType::Classic => queue.argument("x-queue-type", text("classic")),
            // By default, RabbitMQ 4 drops a message after twenty failed deliveries. Its value for no limit, -1,
            // means 0 to older versions.
            QueueType::Quorum => queue
                .argument("x-queue-type", text("quorum"))
                .argument("x-delivery-limit", Value::LongInt(i32::MAX)),
        }
    }

    fn with_backlog(&self, queue: Queue) -> Queue {
        let Some(size) = self.queue.max_backlog else {
            return queue;
        };
        let size = i64::try_from(size.as_u64()).unwrap_or(i64::MAX);
        queue
            .argument("x-max-length-bytes", Value::LongLongInt(size))
            .argument("x-overflow", text("drop-head"))
    }
}

/// Whether the bindings to all exchanges survive a restart of the broker.
fn least_durable(exchanges: &[Exchange]) -> Durability {
    let is_durable = |exchange: &Exchange| exchange.durability == Durability::Durable;
    match exchanges.iter().all(is_durable) {
        true => Durability::Durable,
        false => Durability::Transient,
    }
}

fn text(text: &str) -> Value {
    Value::LongString(text.into())
}

/// A queue that is bound to the exchange, and a connection that is ready to consume.
pub struct Prepared {
    connection: Connection,
    queue: BoundQueue,
    credit: Credit,
}

impl Prepared {
    /// Consumes the queue. The broker has `max_wait` to confirm the consumer, by default the connection timeout.
    /// Every message that is published after this call is received.
    ///
    /// # Errors
    ///
    /// When the broker refuses, does not answer in time, or is lost.
    pub fn consume(self, max_wait: Option<Duration>) -> Result<Subscription, Error> {
        let Prepared { connection, queue, credit } = self;
        let deliveries = match queue.cursor() {
            Some(cursor) => cursor.consume(connection, max_wait)?,
            None => connection.consume(&queue.name, max_wait)?,
        };
        log::info!("consuming queue '{}' bound to {}", queue.name, queue.bindings);
        Ok(Subscription::new(deliveries, queue, credit))
    }
}
